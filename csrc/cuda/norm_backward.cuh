// A norm's backward pass: the gradient of x row by row, those of weight and bias summed over all
// rows. N is a formula of math/*_norm.h.
//
// Bytes: grad, x and grad_total are read once, grad_x written once. From cache, the statistics are
// read by each thread of their row and the weight for each row, and the bias too where x is y. Rows
// of more than 8,192 features (4,096 in float64; half of that where no 16-byte access is allowed)
// do not fit in the registers of a block: grad, x and the statistics are read a second time, and a
// number or two a row go from the first pass to the second. The parameters' gradients add a write
// and a read of `features` numbers for each of at most kMostShares shares, which are then summed in
// their order. Shares depend on the shape and on alignment alone.
//
// Occupancy: 512 threads a multiprocessor where rows are held, so at most 128 registers a thread;
// 1,024 threads elsewhere, at most 64 registers.
#pragma once

#include "cuda/norm.cuh"

namespace effkern::cuda {
namespace {

constexpr int kMostHeldLanes = 512;
constexpr int kTileThreads = 256;

// How many packs of V elements a thread holds of grad and of x. Elements one by one take more
// registers.
template <class T, int V>
constexpr int kHeldBackward = (sizeof(T) == 8 ? 8 : 16) / (V == 1 ? 2 : V);

// The task with types, as kernel arguments.
template <class T, int V>
struct Backward {
  const T* grad;
  const T* grad_total;
  const T* x;
  const Acc<T>* statistics;
  T* grad_x;
  Acc<T>* partial;      // shares x sums x features; null where sums is 0
  int sums;             // as the task has them
  Acc<T>* projections;  // kBackwardSums x rows, between the two passes over long rows
  Parameters<T, V> parameters;
  RowLayout grad_rows, grad_total_rows, x_rows;
  int64_t rows, features;
  bool x_is_y;
  NormBounds<Acc<T>> bounds;

  explicit Backward(const NormBackward& task)
      : grad(static_cast<const T*>(task.grad)),
        grad_total(static_cast<const T*>(task.grad_total)),
        x(static_cast<const T*>(task.x)),
        statistics(static_cast<const Acc<T>*>(task.statistics)),
        grad_x(static_cast<T*>(task.grad_x)),
        partial(nullptr),
        sums(task.sums()),
        projections(nullptr),
        parameters{task.weight, task.bias, task.weight_dtype == task.dtype},
        grad_rows(task.grad_rows),
        grad_total_rows(task.grad_total_rows),
        x_rows(task.x_rows),
        rows(task.rows),
        features(task.features),
        x_is_y(task.x_is_y),
        bounds{static_cast<Acc<T>>(least_beside_bias(task.dtype)),
               static_cast<Acc<T>>(least_weight(task.dtype))} {}
};

template <class T, int V>
__device__ __forceinline__ void widen_pack(const Pack<T, V>& pack, Acc<T> (&values)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = widen(pack.value[v]);
}

// What was normalised at `feature`, from what the task has for it.
template <class N, class T, int V>
__device__ __forceinline__ void restore(const Backward<T, V>& p, Pack<T, V>& x, int64_t feature,
                                        NormRow<Acc<T>> kept) {
  if (!p.x_is_y) return;
  Acc<T> values[V];
  widen_pack(x, values);
  p.parameters.undo(values, feature, p.bounds);
#pragma unroll
  for (int v = 0; v < V; ++v) x.value[v] = narrow<T>(N::restored(values[v], kept));
}

// grad_x of V features from g = weight * grad, with grad_total (null: none) added.
template <class N, class T, int V>
__device__ __forceinline__ void store_grad_x(T* grad_x, const Acc<T> (&g)[V], const Pack<T, V>& x,
                                             NormRow<Acc<T>> kept,
                                             NormProjection<Acc<T>> projection,
                                             const T* grad_total) {
  Acc<T> values[V];
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = N::grad_x(g[v], widen(x.value[v]), kept, projection);
  if (grad_total != nullptr) {
    const Pack<T, V> addend = load<V>(grad_total);
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] += widen(addend.value[v]);
  }
  Pack<T, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) result.value[v] = narrow<T>(values[v]);
  store(grad_x, result);
}

// The groups' sums of one block become the block's share. `sums`: groups x features in shared
// memory.
template <class S>
__device__ void store_share(const S* sums, int groups, int features, S* share) {
  for (int feature = static_cast<int>(threadIdx.x); feature < features;
       feature += static_cast<int>(blockDim.x)) {
    S sum = sums[feature];
    for (int group = 1; group < groups; ++group) sum += sums[group * features + feature];
    store(share + feature, sum);
  }
}

// The threads' sums of V features in each pack become the block's share, by way of `sums`.
template <int kPacks, int V, class S>
__device__ __forceinline__ void share_sums(const S (&values)[kPacks][V], int lanes, int packs,
                                           S* sums, S* share) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (k * lanes < packs - lane) {
        sums[group * packs * V + (lane + k * lanes) * V + v] = values[k][v];
      }
    }
  }
  __syncthreads();
  store_share(sums, static_cast<int>(blockDim.x) / lanes, packs * V, share);
}

// Rows in the registers of their groups. Each block takes every gridDim.x-th set of rows.
template <class N, class T, int V>
__global__ void __launch_bounds__(kMostHeldLanes) backward_held(Backward<T, V> p, int lanes) {
  constexpr int kPacks = kHeldBackward<T, V>;
  using S = Acc<T>;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes;
  const int packs = static_cast<int>(p.features / V);
  constexpr int kSums = N::kBackwardSums;
  S* const scratch = shared_memory<S>();
  int turn = 0;  // successive sums use the two halves of scratch
  S weight_sums[kPacks][V] = {};
  S bias_sums[kPacks][V] = {};

  for (int64_t first = block_index() * groups; first < p.rows;
       first += int64_t{gridDim.x} * groups) {
    const int64_t row = first + group;
    const int left = row < p.rows ? packs - lane : 0;
    const T* const x_row = p.x + (left > 0 ? row_offset(p.x_rows, row) + lane * V : 0);
    const T* const grad_row = p.grad + (left > 0 ? row_offset(p.grad_rows, row) + lane * V : 0);
    const NormRow<S> kept = row < p.rows ? load_kept<N>(p.statistics, p.rows, row) : NormRow<S>{};
    Pack<T, V> x[kPacks];
    S g[kPacks][V];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const bool exists = k * lanes < left;
      x[k] = exists ? load<V>(x_row + k * lanes * V) : Pack<T, V>{};
      widen_pack(exists ? load<V>(grad_row + k * lanes * V) : Pack<T, V>{}, g[k]);
    }
    NormSums<S> sums{};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k * lanes < left) restore<N>(p, x[k], (lane + k * lanes) * V, kept);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        weight_sums[k][v] += g[k][v] * N::normalised(widen(x[k].value[v]), kept);
        bias_sums[k][v] += g[k][v];
      }
      if (k * lanes < left) p.parameters.scale(g[k], (lane + k * lanes) * V);
#pragma unroll
      for (int v = 0; v < V; ++v) N::add_backward(sums, g[k][v], widen(x[k].value[v]), kept);
    }
    if (p.grad_x == nullptr) continue;
    sums = sums_over_group<kSums>(sums, lanes, scratch + turn * kSums * blockDim.x / kWarp);
    turn ^= 1;
    const NormProjection<S> projection = N::projection(sums, kept, p.features);
    T* const grad_x = p.grad_x + row * p.features + lane * V;
    const T* const grad_total = p.grad_total != nullptr && left > 0
                                    ? p.grad_total + row_offset(p.grad_total_rows, row) + lane * V
                                    : nullptr;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k * lanes >= left) continue;
      const int64_t offset = k * lanes * V;
      store_grad_x<N>(grad_x + offset, g[k], x[k], kept, projection,
                      grad_total == nullptr ? nullptr : grad_total + offset);
    }
  }

  if (p.partial == nullptr) return;
  S* const sums = scratch + 2 * kSums * blockDim.x / kWarp;
  S* const share = p.partial + blockIdx.x * p.sums * p.features;
  share_sums(weight_sums, lanes, packs, sums, share);
  if (p.sums < 2) return;
  __syncthreads();
  share_sums(bias_sums, lanes, packs, sums, share + p.features);
}

// Long rows, first pass: a block for each row's projection.
template <class N, class T, int V>
__global__ void __launch_bounds__(kMostLanes, 1) project(Backward<T, V> p) {
  const int64_t row = block_index();
  if (row >= p.rows) return;
  const T* const x_row = p.x + row_offset(p.x_rows, row);
  const T* const grad_row = p.grad + row_offset(p.grad_rows, row);
  const NormRow<Acc<T>> kept = load_kept<N>(p.statistics, p.rows, row);
  NormSums<Acc<T>> sums{};
  constexpr int kAtOnce = N::kNumbers == 1 ? 2 : 1;  // as many packs as registers hold
#pragma unroll kAtOnce
  for (int64_t i = threadIdx.x; i < p.features / V; i += kMostLanes) {
    Pack<T, V> x = load<V>(x_row + i * V);
    const Pack<T, V> grad = load<V>(grad_row + i * V);
    restore<N>(p, x, i * V, kept);
    Acc<T> g[V];
    widen_pack(grad, g);
    p.parameters.scale(g, i * V);
#pragma unroll
    for (int v = 0; v < V; ++v) N::add_backward(sums, g[v], widen(x.value[v]), kept);
  }
  sums = sums_over_group<N::kBackwardSums>(sums, kMostLanes, shared_memory<Acc<T>>());
  if (threadIdx.x > 0) return;
  const NormProjection<Acc<T>> projection = N::projection(sums, kept, p.features);
  store(p.projections + row, projection.on_xhat);
  if constexpr (N::kBackwardSums == 2) store(p.projections + p.rows + row, projection.on_one);
}

// Long rows, second pass: a thread keeps its features and goes down every gridDim.y-th row.
template <class N, class T, int V>
__global__ void __launch_bounds__(kTileThreads, 4) apply(Backward<T, V> p) {
  using S = Acc<T>;
  const int64_t feature = (int64_t{blockIdx.x} * kTileThreads + threadIdx.x) * V;
  if (feature >= p.features) return;
  S weight_sums[V] = {};
  S bias_sums[V] = {};
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    Pack<T, V> x = load<V>(p.x + row_offset(p.x_rows, row) + feature);
    const Pack<T, V> grad = load<V>(p.grad + row_offset(p.grad_rows, row) + feature);
    const NormRow<S> kept = load_kept<N>(p.statistics, p.rows, row);
    restore<N>(p, x, feature, kept);
    S g[V];
    widen_pack(grad, g);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      weight_sums[v] += g[v] * N::normalised(widen(x.value[v]), kept);
      bias_sums[v] += g[v];
    }
    if (p.grad_x == nullptr) continue;
    p.parameters.scale(g, feature);
    const T* const grad_total = p.grad_total == nullptr
                                    ? nullptr
                                    : p.grad_total + row_offset(p.grad_total_rows, row) + feature;
    NormProjection<S> projection{load(p.projections + row), S(0)};
    if constexpr (N::kBackwardSums == 2) projection.on_one = load(p.projections + p.rows + row);
    store_grad_x<N>(p.grad_x + row * p.features + feature, g, x, kept, projection, grad_total);
  }
  if (p.partial == nullptr) return;
  S* const share = p.partial + blockIdx.y * p.sums * p.features + feature;
#pragma unroll
  for (int v = 0; v < V; ++v) store(share + v, weight_sums[v]);
  if (p.sums < 2) return;
#pragma unroll
  for (int v = 0; v < V; ++v) store(share + p.features + v, bias_sums[v]);
}

// How a task is cut: by shape, type and alignment alone.
struct Cut {
  bool held;
  RowGroups groups;  // of held rows
  int64_t shares;    // blocks that sum the parameters' gradients: of the grid's x for held rows, of
                     // its y for long ones
};

// Enough blocks to fill a large GPU several times, and at least four rows for each thread to sum.
constexpr int64_t kMostShares = 512, kMostLongShares = 64, kFewestRows = 4;

template <class N, class T, int V>
Cut cut(const NormBackward& task) {
  const int64_t packs = task.features / V;
  Cut result{};
  result.held = packs <= kMostHeldLanes * kHeldBackward<T, V>;
  if (result.held) {
    result.groups = row_groups(packs, kHeldBackward<T, V>, 256);
    const int64_t sets = ceil_div(task.rows, result.groups.groups);
    result.shares = task.sums() > 0 ? std::min(ceil_div(sets, kFewestRows), kMostShares)
                                    : std::min(sets, kMostBlocks);
  } else {
    result.shares = std::min(ceil_div(task.rows, kFewestRows), kMostLongShares);
  }
  return result;
}

template <class N, class T, int V>
void launch_backward(const NormBackward& task, void* workspace, cudaStream_t stream) {
  using S = Acc<T>;
  Backward<T, V> arguments(task);
  const Cut how = cut<N, T, V>(task);
  const int sums = task.sums();
  if (sums > 0) arguments.partial = static_cast<S*>(workspace);
  if (task.rows > 0 && how.held) {
    const int groups = how.groups.groups;
    const int64_t scratch =
        2 * N::kBackwardSums * how.groups.warps() + (sums > 0 ? groups * task.features : 0);
    launch(backward_held<N, T, V>, grid(how.shares), how.groups.threads(), scratch * sizeof(S),
           stream, arguments, how.groups.lanes);
  } else if (task.rows > 0) {
    if (task.grad_x != nullptr) {
      arguments.projections = static_cast<S*>(workspace) + how.shares * sums * task.features;
      launch(project<N, T, V>, grid(task.rows), kMostLanes,
             N::kBackwardSums * kMostLanes / kWarp * sizeof(S), stream, arguments);
    }
    const dim3 tiles(static_cast<unsigned>(ceil_div(task.features / V, kTileThreads)),
                     static_cast<unsigned>(how.shares));
    launch(apply<N, T, V>, tiles, kTileThreads, 0, stream, arguments);
  }
  if (sums > 0) sum_shares(task, workspace, how.shares, stream);
}

template <class T>
bool takes_packs(const NormBackward& task) {
  constexpr int kV = kWidth<T>;
  return task.features % kV == 0 && is_aligned(task.grad, task.grad_rows, kV) &&
         is_aligned(task.x, task.x_rows, kV) &&
         (task.grad_total == nullptr || is_aligned(task.grad_total, task.grad_total_rows, kV)) &&
         is_aligned(task.weight) && is_aligned(task.bias) && is_aligned(task.grad_x);
}

// Calls body(Type<T>{}, std::integral_constant<int, V>{}) with the type and the pack that serve the
// task.
template <class Body>
void with_type_and_pack(const NormBackward& task, Body&& body) {
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (takes_packs<T>(task)) {
      body(type, std::integral_constant<int, kWidth<T>>{});
    } else {
      body(type, std::integral_constant<int, 1>{});
    }
  });
}

template <class N>
int64_t backward_workspace(const NormBackward& task) {
  int64_t numbers = 0;
  with_type_and_pack(task, [&](auto type, auto pack) {
    const Cut how = cut<N, typename decltype(type)::type, pack.value>(task);
    numbers += how.shares * task.sums() * task.features;
    if (task.grad_x != nullptr && !how.held) numbers += N::kBackwardSums * task.rows;
  });
  return numbers * size_of(accumulation_of(task.dtype));
}

template <class N>
void run_backward(const NormBackward& task, void* workspace, cudaStream_t stream) {
  if (task.features == 0 || (task.grad_x == nullptr && task.sums() == 0)) return;
  with_type_and_pack(task, [&](auto type, auto pack) {
    launch_backward<N, typename decltype(type)::type, pack.value>(task, workspace, stream);
  });
}

}  // namespace
}  // namespace effkern::cuda
