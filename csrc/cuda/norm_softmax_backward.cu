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
constexpr int kSums = 4;  // e, e g, e c and e g c
constexpr int kBackwardScratch = kFindScratch + kSums;

template <class T, int V>
struct Gradients {
  StridedPacks<const T, V> grad;
  StridedPacks<T, V> grad_x;  // data null: not wanted
  Acc<T>* grad_tau;           // null: not wanted
};

template <class S>
__device__ __forceinline__ void add_terms(S (&sums)[kSums], S e, S g, S c) {
  SoftmaxSums<S> all{sums[0], sums[1], sums[2], sums[3]};
  all.add(e, g, c);
  sums[0] = all.e, sums[1] = all.eg, sums[2] = all.ec, sums[3] = all.egc;
}

// From the sums over a row; of a row without a visible entry, zeros.
template <class S>
__device__ __forceinline__ SoftmaxGradient<S> gradient_of(const S (&sums)[kSums],
                                                          const RowFound<S>& row, S tau) {
  if (row.count == 0) return {};
  return softmax_gradient(SoftmaxSums<S>{sums[0], sums[1], sums[2], sums[3]}, row.squares,
                          row.divisor, tau);
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
    const Pack<T, V> pack = k * lanes < left
                                ? load<V>(grad + gradients.grad.place(lane + k * lanes))
                                : Pack<T, V>{};
#pragma unroll
    for (int v = 0; v < V; ++v) g[k][v] = held.sees(k, v) ? widen(pack.value[v]) : S(0);
  }
  S* const scratch = shared_memory<S>();
  const RowFound<S> found = find(held, p, lanes, p.mask.adds(), scratch,
                                 [&](int k, int v) { return e[k][v]; });
  S sums[kSums] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const S exponential = exponential_of(found, held.x[k][v], e[k][v]);
      e[k][v] = held.sees(k, v) ? exponential : S(0);
      add_terms(sums, e[k][v], g[k][v], held.x[k][v]);
    }
  }
  sum_over_group(sums, lanes, scratch + kFindScratch * (blockDim.x / kWarp));
  if (left <= 0) return;
  const SoftmaxGradient<S> gradient = gradient_of(sums, found, p.tau());
  if (gradients.grad_tau != nullptr && lane == 0) {
    store(gradients.grad_tau + row, gradient.grad_tau);
  }
  if (gradients.grad_x.data == nullptr) return;
  T* const out = gradients.grad_x.row(row);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (k * lanes >= left) continue;
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      pack.value[v] = narrow<T>(softmax_grad_x(e[k][v], g[k][v], held.x[k][v], gradient));
    }
    store(out + gradients.grad_x.place(lane + k * lanes), pack);
  }
}

// A row too long for registers, read three times by its block.
template <class T, int V>
__global__ void __launch_bounds__(kLongThreads)
    softmax_backward_long(SoftmaxArguments<T, V> p, Gradients<T, V> gradients) {
  using S = Acc<T>;
  const int64_t row = block_index();
  if (row >= p.rows) return;
  S* const scratch = shared_memory<S>();
  const int64_t packs = p.features / V;
  const RowFound<S> found = find_long(p, row, scratch);
  const T* const x = p.x.row(row);
  const T* const grad = gradients.grad.row(row);

  LongSums<S, kSums> all;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += kLongThreads) {
    const Pack<T, V> pack = load<V>(x + p.x.place(i));
    const Pack<T, V> g = load<V>(grad + gradients.grad.place(i));
    add_pack(all, found, pack, p.mask.at(row, i), [&](S(&sums)[kSums], int v, S e) {
      add_terms(sums, e, widen(g.value[v]), widen(pack.value[v]) - found.mean);
    });
  }
  combine_over_block(all, scratch + kLongFindScratch * kLongThreads / kWarp);
  const SoftmaxGradient<S> gradient = gradient_of(all.sums, found, p.tau());
  if (gradients.grad_tau != nullptr && threadIdx.x == 0) {
    store(gradients.grad_tau + row, gradient.grad_tau);
  }
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
      const S dx =
          softmax_grad_x(e, widen(g.value[v]), widen(pack.value[v]) - found.mean, gradient);
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
    constexpr int kScratch = (kLongFindScratch + 1 + kSums) * kLongThreads / kWarp;
    launch(softmax_backward_long<T, V>, grid(task.rows), kLongThreads, kScratch * sizeof(Acc<T>),
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
