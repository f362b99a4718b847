// NormSoftmax's cross-entropy: each row's loss, and its gradient, in place of the logits where that
// is asked for.
//
// Bytes: a block reads its row three times, for the deviation, which all exponentials need, for the
// sums over those, and for the gradient, which is written once; without gradients twice. Weights
// and probabilities are read twice.
//
// Occupancy: 1,024 threads a multiprocessor, so at most 64 registers a thread.
#include "cuda/cross_entropy.h"
#include "cuda/norm_softmax.cuh"
#include "math/cross_entropy.h"

namespace effkern::cuda {
namespace {

template <class T, int V>
struct CrossEntropy {
  using S = Acc<T>;
  SoftmaxArguments<T, V> softmax;
  const void* target;
  TargetKind kind;
  RowLayout target_rows;
  const S* weight;
  S share, uniform;  // of the target, and of every class alike
  int64_t ignore_index;
  const S* scale;
  int64_t scale_stride;
  S* loss;
  StridedPacks<T, V> grad;  // data null: not wanted
  S* grad_tau;

  // The coefficients of a pack of classes.
  __device__ __forceinline__ void coefficients(int64_t row, int64_t index, int64_t pack,
                                               S (&a)[V]) const {
    if (kind == TargetKind::kIndices) {
#pragma unroll
      for (int v = 0; v < V; ++v) a[v] = uniform + (pack * V + v == index ? share : S(0));
    } else if (kind == TargetKind::kAccumulated) {
      of_probabilities(static_cast<const S*>(target), row, pack, a);
    } else if constexpr (sizeof(T) < sizeof(S)) {
      of_probabilities(static_cast<const T*>(target), row, pack, a);
    }
    if (weight == nullptr) return;
#pragma unroll
    for (int v = 0; v < V; ++v) a[v] *= load(weight + pack * V + v);
  }

 private:
  template <class Q>
  __device__ __forceinline__ void of_probabilities(const Q* data, int64_t row, int64_t pack,
                                                   S (&a)[V]) const {
    const Q* const q = data + row_offset(target_rows, row) + pack * V;
#pragma unroll
    for (int v = 0; v < V; ++v) a[v] = widen(load(q + v)) * share + uniform;
  }
};

// Of numbers with weights: their sum and the mean.
template <class S>
struct WeightedMean {
  S weight, mean;

  __device__ __forceinline__ void scale(S factor) { weight *= factor; }
  __device__ __forceinline__ void add(S e, S c) {
    const S both = weight + e;
    if (both > 0) mean += (c - mean) * (e / both);
    weight = both;
  }
};

constexpr int kCrossEntropyScratch = kLongFindScratch + 1 + 4;

template <class T, int V>
__global__ void __launch_bounds__(kLongThreads) cross_entropy_kernel(CrossEntropy<T, V> p) {
  using S = Acc<T>;
  const int64_t row = block_index();
  if (row >= p.softmax.rows) return;
  const int threads = static_cast<int>(blockDim.x);
  const int64_t packs = p.softmax.features / V;
  const T* const x = p.softmax.x.row(row);
  T* const grad = p.grad.data == nullptr ? nullptr : p.grad.row(row);
  int64_t index = 0;
  if (p.kind == TargetKind::kIndices) {
    index = load(static_cast<const int64_t*>(p.target) + row);
    if (index == p.ignore_index) {
      if (threadIdx.x == 0) {
        store(p.loss + row, S(0));
        if (p.grad_tau != nullptr) store(p.grad_tau + row, S(0));
      }
      for (int64_t i = threadIdx.x; grad != nullptr && i < packs; i += threads) {
        store(grad + i * V, Pack<T, V>{});
      }
      return;
    }
  }
  S* const scratch = shared_memory<S>();
  const RowFound<S> found = find_long(p.softmax, row, scratch);
  const PackMask<S, V> all_visible{(1u << V) - 1, {}};

  LongSums<S, WeightedMean<S>> all;
  S a_sum = 0, ac_sum = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += threads) {
    const Pack<T, V> pack = load<V>(x + i * V);
    add_pack(all, found, pack, all_visible, [&](WeightedMean<S>& sums, int v, S e) {
      sums.add(e, widen(pack.value[v]) - found.mean);
    });
    S a[V];
    p.coefficients(row, index, i, a);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      a_sum += a[v];
      ac_sum += a[v] * (widen(pack.value[v]) - found.mean);
    }
  }
  const int warps = threads / kWarp;
  raise_together(all, scratch + kLongFindScratch * warps);
  S sums[4] = {all.sums.weight, all.sums.weight * all.sums.mean, a_sum, ac_sum};
  sum_over_group(sums, threads, scratch + (kLongFindScratch + 1) * warps);
  const S total = sums[0], mean_c = sums[1] / total, a_total = sums[2], ac = sums[3];
  if (threadIdx.x == 0) {
    // As if less the largest logit: what is equal to it stays so.
    const CrossEntropySums<S> of_loss{total, 0, a_total, ac * found.inverse - a_total * all.top};
    const bool valid = 0 <= index && index < p.softmax.features;
    store(p.loss + row, valid ? cross_entropy(of_loss, S(1)) : S(NAN));
  }
  if (p.scale == nullptr) return;

  const S scale = load(p.scale + row * p.scale_stride);
  const S along = a_total * mean_c - ac;
  if (p.grad_tau != nullptr && threadIdx.x == 0) {
    store(p.grad_tau + row, scale * softmax_grad_tau(along, p.softmax.tau(), found.divisor));
  }
  if (grad == nullptr) return;
  const SoftmaxGradient<S> gradient{S(0), S(0), found.inverse * scale,
                                    softmax_on_c(along, found.squares, found.divisor)};
  const S factor = a_total / total;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += threads) {
    const Pack<T, V> pack = load<V>(x + i * V);
    S a[V];
    p.coefficients(row, index, i, a);
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const S c = widen(pack.value[v]) - found.mean;
      const S e = exponential(normalised_logit(c, S(0), found.inverse) - all.top);
      result.value[v] =
          narrow<T>(softmax_grad_x(cross_entropy_grad_logit(e, a[v], factor), c, gradient));
    }
    store(grad + i * V, result);
  }
}

template <class T, int V>
void launch_cross_entropy(const NormSoftmaxCrossEntropyTask& task, cudaStream_t stream) {
  using S = Acc<T>;
  NormSoftmaxTask softmax{};
  softmax.dtype = task.dtype;
  softmax.x = task.logits;
  softmax.x_rows = {task.logits_rows, 1};
  softmax.tau = task.tau;
  softmax.tau_value = task.tau_value;
  softmax.eps = task.eps;
  softmax.rows = task.rows;
  softmax.features = task.classes;
  const CrossEntropy<T, V> arguments{
      softmax_arguments<T, V>(softmax),
      task.target,
      task.target_kind,
      task.target_rows,
      static_cast<const S*>(task.weight),
      static_cast<S>(1 - task.label_smoothing),
      static_cast<S>(task.label_smoothing / static_cast<double>(task.classes)),
      task.ignore_index,
      static_cast<const S*>(task.scale),
      task.scale_stride,
      static_cast<S*>(task.loss),
      {static_cast<T*>(task.grad), {task.grad_rows, 1}},
      static_cast<S*>(task.grad_tau)};
  const int64_t packs = task.classes / V;
  const int threads =
      static_cast<int>(std::clamp<int64_t>(ceil_div(packs, kWarp) * kWarp, kWarp, kLongThreads));
  launch(cross_entropy_kernel<T, V>, grid(task.rows), threads,
         kCrossEntropyScratch * (threads / kWarp) * sizeof(S), stream, arguments);
}

}  // namespace

void norm_softmax_cross_entropy(const NormSoftmaxCrossEntropyTask& task, cudaStream_t stream) {
  if (task.rows == 0) return;
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kV = kWidth<T>;
    const auto aligned = [&](const void* data, const RowLayout& rows) {
      return in_packs<kV>(data, {rows, 1}, task.classes, sizeof(T));
    };
    if (aligned(task.logits, task.logits_rows) &&
        (task.grad == nullptr || aligned(task.grad, task.grad_rows))) {
      launch_cross_entropy<T, kV>(task, stream);
    } else {
      launch_cross_entropy<T, 1>(task, stream);
    }
  });
}

}  // namespace effkern::cuda
