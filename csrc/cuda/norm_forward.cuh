// A norm's forward pass, with the residual added first where there is one. N is a formula of
// math/*_norm.h.
//
// Bytes: x and residual are read once, y, total and statistics written once. Weight and bias are
// read for each row, from cache. Rows of more than 16,384 features (8,192 in float64) do not fit in
// the registers of a block: x, or the total just written, is read a second time. LayerNorm reads a
// long row's first kOriginFeatures features once more before, and a row that begins far from its
// mean a third time.
//
// Occupancy: 1,024 threads a multiprocessor, so at most 64 registers a thread.
#pragma once

#include "cuda/norm.cuh"

namespace effkern::cuda {
namespace {

// How many packs of V elements a thread holds: 64 bytes, and as many elements of a 16-bit type as
// of float32.
template <class T, int V>
constexpr int kHeldForward = (sizeof(T) == 8 ? 8 : 16) / V;

// The task with types, as kernel arguments.
template <class T, int V>
struct Forward {
  const T* x;
  const T* residual;
  T* y;
  T* total;
  Acc<T>* statistics;
  Parameters<T, V> parameters;
  RowLayout x_rows, residual_rows;
  int64_t rows, features;
  Acc<T> eps;

  explicit Forward(const NormForward& task)
      : x(static_cast<const T*>(task.x)),
        residual(static_cast<const T*>(task.residual)),
        y(static_cast<T*>(task.y)),
        total(static_cast<T*>(task.total)),
        statistics(static_cast<Acc<T>*>(task.statistics)),
        parameters{task.weight, task.bias, task.weight_dtype == task.dtype},
        x_rows(task.x_rows),
        residual_rows(task.residual_rows),
        rows(task.rows),
        features(task.features),
        eps(static_cast<Acc<T>>(task.eps)) {}
};

template <class N, class T, int V>
__device__ __forceinline__ void add_pack(NormSums<Acc<T>>& sums, const Pack<T, V>& pack,
                                         Acc<T> origin) {
#pragma unroll
  for (int v = 0; v < V; ++v) N::add_forward(sums, widen(pack.value[v]), origin);
}

template <class T, int V>
__device__ __forceinline__ Acc<T> sum_of(const Pack<T, V>& pack) {
  Acc<T> sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += widen(pack.value[v]);
  return sum;
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> add(const Pack<T, V>& a, const Pack<T, V>& b) {
  Pack<T, V> sum;
#pragma unroll
  for (int v = 0; v < V; ++v) sum.value[v] = narrow<T>(widen(a.value[v]) + widen(b.value[v]));
  return sum;
}

template <class N, class T, int V>
__device__ __forceinline__ Pack<T, V> normalise(const Pack<T, V>& pack, NormRow<Acc<T>> kept,
                                                const Parameters<T, V>& parameters,
                                                int64_t feature) {
  Acc<T> values[V];
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = N::normalised(widen(pack.value[v]), kept);
  parameters.scale(values, feature);
  parameters.shift(values, feature);
  Pack<T, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) result.value[v] = narrow<T>(values[v]);
  return result;
}

// Numbers of shared memory that the sums of a block take for each of its warps.
template <class N>
constexpr int kForwardScratch = N::kForwardSums + (N::kHasOrigin ? 1 : 0);

// A row in the registers of its group.
template <class N, class T, int V>
__global__ void __launch_bounds__(kMostLanes) forward_held(Forward<T, V> p, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t row = block_index() * (blockDim.x / lanes) + threadIdx.x / lanes;
  // Of this thread's packs, lane, lane + lanes, ..., number k exists where k * lanes < left. Groups
  // past the last row have none; they go along because all threads meet in the sum.
  const int left = row < p.rows ? static_cast<int>(p.features / V) - lane : 0;
  Pack<T, V> held[kHeldForward<T, V>];
  const T* const x = p.x + (left > 0 ? row_offset(p.x_rows, row) + lane * V : 0);
#pragma unroll
  for (int k = 0; k < kHeldForward<T, V>; ++k) {
    held[k] = k * lanes < left ? load<V>(x + k * lanes * V) : Pack<T, V>{};
  }
  if (p.residual != nullptr && left > 0) {
    const T* const residual = p.residual + row_offset(p.residual_rows, row) + lane * V;
    T* const total = p.total + row * p.features + lane * V;
    // Several loads before the first store, which would hold them up.
    constexpr int kBatch = kHeldForward<T, V> < 4 ? kHeldForward<T, V> : 4;
#pragma unroll
    for (int batch = 0; batch < kHeldForward<T, V>; batch += kBatch) {
      Pack<T, V> addend[kBatch];
#pragma unroll
      for (int k = batch; k < batch + kBatch; ++k) {
        if (k * lanes < left) addend[k - batch] = load<V>(residual + k * lanes * V);
      }
#pragma unroll
      for (int k = batch; k < batch + kBatch; ++k) {
        if (k * lanes >= left) continue;
        held[k] = add(held[k], addend[k - batch]);
        store(total + k * lanes * V, held[k]);
      }
    }
  }
  using S = Acc<T>;
  S* scratch = shared_memory<S>();
  S origin = 0;
  if constexpr (N::kHasOrigin) {
    S sum[1] = {};
#pragma unroll
    for (int k = 0; k < kHeldForward<T, V>; ++k) sum[0] += sum_of(held[k]);
    sum_over_group(sum, lanes, scratch);
    scratch += blockDim.x / kWarp;
    origin = sum[0] / static_cast<S>(p.features);
  }
  NormSums<S> sums{};
#pragma unroll
  for (int k = 0; k < kHeldForward<T, V>; ++k) {
    // A pack that does not exist holds zeros, which are not at the origin.
    if (!N::kHasOrigin || k * lanes < left) add_pack<N>(sums, held[k], origin);
  }
  sums = sums_over_group<N::kForwardSums>(sums, lanes, scratch);
  if (row >= p.rows) return;
  const NormRow<S> kept = N::kept(sums, origin, p.features, p.eps);
  if (lane == 0) store_kept<N>(p.statistics, p.rows, row, kept);
  T* const y = p.y + row * p.features + lane * V;
#pragma unroll
  for (int k = 0; k < kHeldForward<T, V>; ++k) {
    if (k * lanes >= left) continue;
    store(y + k * lanes * V, normalise<N>(held[k], kept, p.parameters, (lane + k * lanes) * V));
  }
}

// A row too long for registers: read by its block once for the sums and once more for the result.
template <class N, class T, int V>
__global__ void __launch_bounds__(kMostLanes) forward_twice(Forward<T, V> p) {
  using S = Acc<T>;
  const int64_t row = block_index();
  if (row >= p.rows) return;
  const int64_t packs = p.features / V;
  // As many packs as registers hold, in a loop that reads and in one that also writes.
  constexpr int kReadAtOnce = N::kForwardSums == 1 ? 4 : 2;
  constexpr int kWrittenAtOnce = V < 8 ? kReadAtOnce : 2;
  const T* source = p.x + row_offset(p.x_rows, row);
  const T* const residual =
      p.residual == nullptr ? nullptr : p.residual + row_offset(p.residual_rows, row);
  // Successive sums use the two halves of scratch.
  S* const scratch = shared_memory<S>();
  S* const other = scratch + N::kForwardSums * kMostLanes / kWarp;
  S origin = 0;
  if constexpr (N::kHasOrigin) {
    S sum[1] = {};
    const int64_t i = static_cast<int64_t>(threadIdx.x) * V;
    if (i < kOriginFeatures) {
      const Pack<T, V> pack = load<V>(source + i);
      sum[0] = sum_of(residual == nullptr ? pack : add(pack, load<V>(residual + i)));
    }
    sum_over_group(sum, kMostLanes, other);
    origin = sum[0] / static_cast<S>(kOriginFeatures);
  }
  NormSums<S> sums{};
  if (residual == nullptr) {
#pragma unroll kReadAtOnce
    for (int64_t i = threadIdx.x; i < packs; i += kMostLanes) {
      add_pack<N>(sums, load<V>(source + i * V), origin);
    }
  } else {
    T* const total = p.total + row * p.features;
#pragma unroll kWrittenAtOnce
    for (int64_t i = threadIdx.x; i < packs; i += kMostLanes) {
      const Pack<T, V> pack = add(load<V>(source + i * V), load<V>(residual + i * V));
      store(total + i * V, pack);
      add_pack<N>(sums, pack, origin);
    }
    source = total;  // each thread reads what it wrote itself
  }
  sums = sums_over_group<N::kForwardSums>(sums, kMostLanes, scratch);
  if constexpr (N::kHasOrigin) {
    if (N::is_far(sums, p.features)) {  // for all threads of the block, or for none
      origin = N::mean(sums, origin, p.features);
      sums = {};
#pragma unroll 1
      for (int64_t i = threadIdx.x; i < packs; i += kMostLanes) {
        add_pack<N>(sums, load<V>(source + i * V), origin);
      }
      sums = sums_over_group<N::kForwardSums>(sums, kMostLanes, other);
    }
  }
  const NormRow<S> kept = N::kept(sums, origin, p.features, p.eps);
  if (threadIdx.x == 0) store_kept<N>(p.statistics, p.rows, row, kept);
  T* const y = p.y + row * p.features;
#pragma unroll kWrittenAtOnce
  for (int64_t i = threadIdx.x; i < packs; i += kMostLanes) {
    store(y + i * V, normalise<N>(load<V>(source + i * V), kept, p.parameters, i * V));
  }
}

template <class N, class T, int V>
void launch_forward(const NormForward& task, cudaStream_t stream) {
  const Forward<T, V> arguments(task);
  const int64_t packs = task.features / V;
  if (packs > kMostLanes * kHeldForward<T, V>) {
    constexpr int kScratch = N::kForwardSums * (N::kHasOrigin ? 2 : 1) * kMostLanes / kWarp;
    launch(forward_twice<N, T, V>, grid(task.rows), kMostLanes, kScratch * sizeof(Acc<T>), stream,
           arguments);
    return;
  }
  const RowGroups groups = row_groups(packs, kHeldForward<T, V>, 128);
  launch(forward_held<N, T, V>, grid(ceil_div(task.rows, groups.groups)), groups.threads(),
         kForwardScratch<N> * groups.warps() * sizeof(Acc<T>), stream, arguments, groups.lanes);
}

template <class T>
bool takes_packs(const NormForward& task) {
  constexpr int kV = kWidth<T>;
  return task.features % kV == 0 && is_aligned(task.x, task.x_rows, kV) &&
         (task.residual == nullptr || is_aligned(task.residual, task.residual_rows, kV)) &&
         is_aligned(task.weight) && is_aligned(task.bias) && is_aligned(task.y) &&
         is_aligned(task.total);
}

template <class N>
void run_forward(const NormForward& task, cudaStream_t stream) {
  if (task.rows == 0) return;
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (takes_packs<T>(task)) {
      launch_forward<N, T, kWidth<T>>(task, stream);
    } else {
      launch_forward<N, T, 1>(task, stream);
    }
  });
}

}  // namespace
}  // namespace effkern::cuda
