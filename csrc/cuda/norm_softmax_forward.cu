// NormSoftmax's forward pass.
//
// Bytes: x and the mask are read once, y is written once. Rows of more than 16,384 elements (8,192
// in float64; half of these with an additive mask) do not fit in the registers of a block: they are
// read three times, for the deviation, which all exponentials need, for the sum of those, and for
// the result.
//
// Occupancy: 1,024 threads a multiprocessor, so at most 64 registers a thread; with an additive
// mask and a row held 512 threads, at most 128 registers.
#include "cuda/norm_softmax.cuh"
#include "cuda/norm_softmax.h"

namespace effkern::cuda {
namespace {

template <bool kAdds>
constexpr int kMostHeldLanes = kAdds ? 512 : 1024;

constexpr int kForwardScratch = kFindScratch + 1;

// A row in the registers of its group.
template <class T, int V, bool kAdds>
__global__ void __launch_bounds__(kMostHeldLanes<kAdds>)
    softmax_held(SoftmaxArguments<T, V> p, StridedPacks<T, V> y, int lanes) {
  using S = Acc<T>;
  constexpr int kPacks = kHeldPacks<T, V>;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t row = block_index() * (blockDim.x / lanes) + threadIdx.x / lanes;
  // Of this thread's packs, lane, lane + lanes, ..., number k exists where k * lanes < left. Groups
  // past the last row have none; they go along because all threads meet in the sums.
  const int left = row < p.rows ? static_cast<int>(p.features / V) - lane : 0;
  S bias[kAdds ? kPacks : 1][kAdds ? V : 1] = {};
  const auto keep = [&](int k, int v, S value) {
    if constexpr (kAdds) bias[k][v] = value;
  };
  const auto bias_at = [&](int k, int v) {
    if constexpr (kAdds) return bias[k][v];
    return S(0);
  };
  auto held = read_row<T, V, kPacks>(p, row, lane, lanes, left, keep);
  S* const scratch = shared_memory<S>();
  const RowFound<S> found = find(held, p, lanes, kAdds, scratch, bias_at);

  S sum[1] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const S e = exponential_of(found, held.x[k][v], bias_at(k, v));
      held.x[k][v] = held.sees(k, v) ? e : S(0);
      sum[0] += held.x[k][v];
    }
  }
  sum_over_group(sum, lanes, scratch + kFindScratch * (blockDim.x / kWarp));
  if (left <= 0) return;
  const S factor = found.count == 0 ? S(0) : S(1) / sum[0];
  T* const out = y.row(row);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (k * lanes >= left) continue;
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = narrow<T>(held.x[k][v] * factor);
    store(out + y.place(lane + k * lanes), pack);
  }
}

template <class S>
struct ExponentialSum {
  S value;
  __device__ __forceinline__ void scale(S factor) { value *= factor; }
};

// A row too long for registers, read three times by its block.
template <class T, int V>
__global__ void __launch_bounds__(kLongThreads)
    softmax_long(SoftmaxArguments<T, V> p, StridedPacks<T, V> y) {
  using S = Acc<T>;
  const int64_t row = block_index();
  if (row >= p.rows) return;
  S* const scratch = shared_memory<S>();
  const int64_t packs = p.features / V;
  const RowFound<S> found = find_long(p, row, scratch);
  const T* const x = p.x.row(row);

  LongSums<S, ExponentialSum<S>> all;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += kLongThreads) {
    add_pack(all, found, load<V>(x + p.x.place(i)), p.mask.at(row, i),
             [](ExponentialSum<S>& sum, int, S e) { sum.value += e; });
  }
  raise_together(all, scratch + kLongFindScratch * kLongThreads / kWarp);
  const S factor = S(1) / sum_over_group(all.sums.value, kLongThreads,
                                         scratch + (kLongFindScratch + 1) * kLongThreads / kWarp);
  T* const out = y.row(row);
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += kLongThreads) {
    const Pack<T, V> pack = load<V>(x + p.x.place(i));
    const PackMask<S, V> mask = p.mask.at(row, i);
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const S e = exponential(logit_of(found, pack, mask, v) - all.top);
      result.value[v] = narrow<T>(mask.visible >> v & 1 ? e * factor : S(0));
    }
    store(out + y.place(i), result);
  }
}

template <class T, int V, bool kAdds>
void launch_held(const NormSoftmaxForward& task, const SoftmaxArguments<T, V>& arguments,
                 const StridedPacks<T, V>& y, cudaStream_t stream) {
  const RowGroups groups =
      row_groups(task.features / V, kHeldPacks<T, V>, threads_of_a_block(task));
  launch(softmax_held<T, V, kAdds>, grid(ceil_div(task.rows, groups.groups)), groups.threads(),
         kForwardScratch * groups.warps() * sizeof(Acc<T>), stream, arguments, y, groups.lanes);
}

template <class T, int V>
void launch_forward(const NormSoftmaxForward& task, cudaStream_t stream) {
  const auto arguments = softmax_arguments<T, V>(task);
  const StridedPacks<T, V> y{static_cast<T*>(task.y), task.y_rows};
  const bool adds =
      task.mask_kind == MaskKind::kAsInput || task.mask_kind == MaskKind::kAccumulated;
  const int64_t lanes = adds ? kMostHeldLanes<true> : kMostHeldLanes<false>;
  if (task.features / V > lanes * kHeldPacks<T, V>) {
    constexpr int kScratch = (kLongFindScratch + 2) * kLongThreads / kWarp;
    launch(softmax_long<T, V>, grid(task.rows), kLongThreads, kScratch * sizeof(Acc<T>), stream,
           arguments, y);
  } else if (adds) {
    launch_held<T, V, true>(task, arguments, y, stream);
  } else {
    launch_held<T, V, false>(task, arguments, y, stream);
  }
}

}  // namespace

void norm_softmax_forward(const NormSoftmaxForward& task, cudaStream_t stream) {
  if (task.rows == 0 || task.features == 0) return;
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kV = kWidth<T>;
    if (in_packs<kV>(task.x, task.x_rows, task.features, sizeof(T)) &&
        in_packs<kV>(task.y, task.y_rows, task.features, sizeof(T))) {
      launch_forward<T, kV>(task, stream);
    } else {
      launch_forward<T, 1>(task, stream);
    }
  });
}

}  // namespace effkern::cuda
