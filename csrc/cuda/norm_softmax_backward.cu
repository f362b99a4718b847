// NormSoftmax's backward pass. The distribution is computed again from x: what the forward pass
// could have kept of it would take as many bytes to read.
//
// Bytes: x, the mask and grad are read once, grad_x is written once. Rows of more than 8,192
// elements (4,096 in float64) do not fit in the registers of a block: x and the mask are read three
// times, for the deviation, for the sums over exponentials, and for the result, and grad twice.
//
// Occupancy: 512 threads a multiprocessor where rows are held, so at most 128 registers a thread;
// 1,024 threads elsewhere, at most 64 registers.
#include "cuda/norm_softmax.cuh"
#include "cuda/norm_softmax.h"

namespace effkern::cuda {
namespace {

constexpr int kMostHeldLanes = 512;
constexpr int kBackwardScratch = kFindScratch + 3;

template <class T, int V>
struct Gradients {
  StridedPacks<const T, V> grad;
  StridedPacks<T, V> grad_x;  // data null: not wanted
  Acc<T>* grad_tau;           // null: not wanted
};

// What of a row's gradient comes from `along`, sum(dz c); stores tau's share.
template <class T, int V>
__device__ __forceinline__ SoftmaxGradient<Acc<T>> finish(const SoftmaxArguments<T, V>& p,
                                                          const Gradients<T, V>& gradients,
                                                          const RowFound<Acc<T>>& found,
                                                          SoftmaxGradient<Acc<T>> gradient,
                                                          Acc<T> along, int64_t row,
                                                          bool stores_tau) {
  const bool some = found.count > 0;
  if (stores_tau && gradients.grad_tau != nullptr) {
    const Acc<T> share = softmax_grad_tau(along, p.tau(), found.divisor);
    store(gradients.grad_tau + row, some ? share : Acc<T>(0));
  }
  gradient.on_c = some ? softmax_on_c(along, found.squares, found.divisor) : Acc<T>(0);
  return gradient;
}

// A row in the registers of its group.
template <class T, int V>
__global__ void __launch_bounds__(kMostHeldLanes)
    softmax_backward_held(SoftmaxArguments<T, V> p, Gradients<T, V> gradients, int lanes) {
  using S = Acc<T>;
  constexpr int kPacks = kHeldPacks<T, V>;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t row = block_index() * (blockDim.x / lanes) + threadIdx.x / lanes;
  const int left = row < p.rows ? static_cast<int>(p.features / V) - lane : 0;
  S e[kPacks][V];  // at first the biases
  auto held = read_row<T, V, kPacks>(p, row, lane, lanes, left,
                                     [&](int k, int v, S bias) { e[k][v] = bias; });
  S g[kPacks][V];
  const T* const grad = gradients.grad.row(left > 0 ? row : 0);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const Pack<T, V> pack =
        k * lanes < left ? load<V>(grad + gradients.grad.place(lane + k * lanes)) : Pack<T, V>{};
#pragma unroll
    for (int v = 0; v < V; ++v) g[k][v] = held.sees(k, v) ? widen(pack.value[v]) : S(0);
  }
  S* const scratch = shared_memory<S>();
  const RowFound<S> found =
      find(held, p, lanes, p.mask.adds(), scratch, [&](int k, int v) { return e[k][v]; });
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  S sums[2] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const S value = exponential_of(found, held.x[k][v], e[k][v]);
      e[k][v] = held.sees(k, v) ? value : S(0);
      sums[0] += e[k][v];
      sums[1] += e[k][v] * g[k][v];
    }
  }
  sum_over_group(sums, lanes, scratch + kFindScratch * warps);
  const S factor = found.count > 0 ? S(1) / sums[0] : S(0);
  SoftmaxGradient<S> gradient{factor, sums[1] * factor, found.inverse, S(0)};
  S along = 0;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      along += softmax_grad_logit(e[k][v], g[k][v], gradient) * held.x[k][v];
    }
  }
  along = sum_over_group(along, lanes, scratch + (kFindScratch + 2) * warps);
  if (left <= 0) return;
  gradient = finish(p, gradients, found, gradient, along, row, lane == 0);
  if (gradients.grad_x.data == nullptr) return;
  T* const out = gradients.grad_x.row(row);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (k * lanes >= left) continue;
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const S dz = softmax_grad_logit(e[k][v], g[k][v], gradient);
      pack.value[v] = narrow<T>(softmax_grad_x(dz, held.x[k][v], gradient));
    }
    store(out + gradients.grad_x.place(lane + k * lanes), pack);
  }
}

// Of numbers with weights: their sum, the means of two numbers each, and the sum of weight times
// the product of their deviations. Kept so, and not as sums of products, it loses nothing where one
// weight is far above the others, as those of a sharp distribution are.
template <class S>
struct Covariance {
  S weight, mean_g, mean_c, products;

  __device__ __forceinline__ void scale(S factor) {
    weight *= factor;
    products *= factor;
  }
  __device__ __forceinline__ void add(S e, S g, S c) {
    const S both = weight + e, of_g = g - mean_g, of_c = c - mean_c;
    const S part = both > 0 ? e / both : S(0);
    mean_g += of_g * part;
    mean_c += of_c * part;
    products += of_g * of_c * (weight * part);
    weight = both;
  }
  // The same over all threads of a block; `scratch` has four numbers for each warp.
  __device__ __forceinline__ void combine(S* scratch) {
    S sums[3] = {weight, weight * mean_g, weight * mean_c};
    sum_over_group(sums, kLongThreads, scratch);
    const S all_g = sums[1] / sums[0], all_c = sums[2] / sums[0];
    const S mine = products + weight * (mean_g - all_g) * (mean_c - all_c);
    products = sum_over_group(mine, kLongThreads, scratch + 3 * kLongThreads / kWarp);
    weight = sums[0], mean_g = all_g, mean_c = all_c;
  }
};

constexpr int kLongScratch = kLongFindScratch + 5;

// A row too long for registers, read three times by its block.
template <class T, int V>
__global__ void __launch_bounds__(kLongThreads)
    softmax_backward_long(SoftmaxArguments<T, V> p, Gradients<T, V> gradients) {
  using S = Acc<T>;
  const int64_t row = block_index();
  if (row >= p.rows) return;
  constexpr int kWarps = kLongThreads / kWarp;
  S* const scratch = shared_memory<S>();
  const int64_t packs = p.features / V;
  const RowFound<S> found = find_long(p, row, scratch);
  const T* const x = p.x.row(row);
  const T* const grad = gradients.grad.row(row);

  LongSums<S, Covariance<S>> all;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += kLongThreads) {
    const Pack<T, V> pack = load<V>(x + p.x.place(i));
    const Pack<T, V> g = load<V>(grad + gradients.grad.place(i));
    add_pack(all, found, pack, p.mask.at(row, i), [&](Covariance<S>& sums, int v, S e) {
      sums.add(e, widen(g.value[v]), widen(pack.value[v]) - found.mean);
    });
  }
  raise_together(all, scratch + kLongFindScratch * kWarps);
  all.sums.combine(scratch + (kLongFindScratch + 1) * kWarps);
  const S factor = S(1) / all.sums.weight;
  const SoftmaxGradient<S> gradient =
      finish(p, gradients, found, {factor, all.sums.mean_g, found.inverse, S(0)},
             all.sums.products * factor, row, threadIdx.x == 0);
  if (gradients.grad_x.data == nullptr) return;
  T* const out = gradients.grad_x.row(row);
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += kLongThreads) {
    const Pack<T, V> pack = load<V>(x + p.x.place(i));
    const Pack<T, V> g = load<V>(grad + gradients.grad.place(i));
    const PackMask<S, V> mask = p.mask.at(row, i);
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const S e = exponential(logit_of(found, pack, mask, v) - all.top);
      const S dz = softmax_grad_logit(e, widen(g.value[v]), gradient);
      const S dx = softmax_grad_x(dz, widen(pack.value[v]) - found.mean, gradient);
      result.value[v] = narrow<T>(mask.visible >> v & 1 ? dx : S(0));
    }
    store(out + gradients.grad_x.place(i), result);
  }
}

template <class T, int V>
void launch_backward(const NormSoftmaxBackward& task, cudaStream_t stream) {
  const auto arguments = softmax_arguments<T, V>(task);
  const Gradients<T, V> gradients{{static_cast<const T*>(task.grad), task.grad_rows},
                                  {static_cast<T*>(task.grad_x), task.grad_x_rows},
                                  static_cast<Acc<T>*>(task.grad_tau)};
  const int64_t packs = task.features / V;
  if (packs > kMostHeldLanes * kHeldPacks<T, V>) {
    constexpr int kNumbers = kLongScratch * kLongThreads / kWarp;
    launch(softmax_backward_long<T, V>, grid(task.rows), kLongThreads, kNumbers * sizeof(Acc<T>),
           stream, arguments, gradients);
    return;
  }
  const RowGroups groups = row_groups(packs, kHeldPacks<T, V>, threads_of_a_block(task));
  launch(softmax_backward_held<T, V>, grid(ceil_div(task.rows, groups.groups)), groups.threads(),
         kBackwardScratch * groups.warps() * sizeof(Acc<T>), stream, arguments, gradients,
         groups.lanes);
}

}  // namespace

void norm_softmax_backward(const NormSoftmaxBackward& task, cudaStream_t stream) {
  if (task.rows == 0 || task.features == 0) return;
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kV = kWidth<T>;
    const auto aligned = [&](const void* data, const StridedRows& rows) {
      return in_packs<kV>(data, rows, task.features, sizeof(T));
    };
    if (aligned(task.x, task.x_rows) && aligned(task.grad, task.grad_rows) &&
        (task.grad_x == nullptr || aligned(task.grad_x, task.grad_x_rows))) {
      launch_backward<T, kV>(task, stream);
    } else {
      launch_backward<T, 1>(task, stream);
    }
  });
}

}  // namespace effkern::cuda
