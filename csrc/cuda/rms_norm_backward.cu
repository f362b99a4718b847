// RMSNorm backward: the gradient of x row by row, the gradient of the weight summed over all rows.
//
// Bytes: grad, x and grad_total are read once, grad_x written once. From cache, rstd is read by
// each thread of its row and the weight for each row. Rows of more than 8,192 features (4,096 in
// float64) do not fit in the registers of a block: grad, x and rstd are read a second time, and a
// number a row goes from the first pass to the second. The weight's gradient adds a write and a
// read of `features` numbers for each of at most kMostShares shares, which are then summed in their
// order. Shares depend on the shape and on alignment alone.
//
// Occupancy: 512 threads a multiprocessor where rows are held, so at most 128 registers a thread;
// 1,024 threads elsewhere, at most 64 registers.
#include "cuda/memory.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rms_norm.h"
#include "cuda/row_group.cuh"
#include "math/rms_norm.h"

namespace effkern::cuda {
namespace {

constexpr int kMostHeldLanes = 512;
constexpr int kTileThreads = 256;

// How many packs of V elements a thread holds of grad and of x.
template <class T, int V>
constexpr int kHeld = (sizeof(T) == 8 ? 8 : 16) / V;

// The task with types, as kernel arguments.
template <class T, int V>
struct Backward {
  const T* grad;
  const T* grad_total;
  const T* x;
  const Acc<T>* rstd;
  T* grad_x;
  Acc<T>* partial;      // shares x features; null where the weight's gradient is not wanted
  Acc<T>* projections;  // a number a row, between the two passes over long rows
  Weights<T, V> weights;
  RowLayout grad_rows, grad_total_rows, x_rows;
  int64_t rows, features;

  explicit Backward(const RmsNormBackward& task)
      : grad(static_cast<const T*>(task.grad)),
        grad_total(static_cast<const T*>(task.grad_total)),
        x(static_cast<const T*>(task.x)),
        rstd(static_cast<const Acc<T>*>(task.rstd)),
        grad_x(static_cast<T*>(task.grad_x)),
        partial(nullptr),
        projections(nullptr),
        weights{task.weight, task.weight_dtype == task.dtype},
        grad_rows(task.grad_rows),
        grad_total_rows(task.grad_total_rows),
        x_rows(task.x_rows),
        rows(task.rows),
        features(task.features) {}
};

template <class T, int V>
__device__ __forceinline__ void widen_pack(const Pack<T, V>& pack, Acc<T> (&values)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = widen(pack.value[v]);
}

// grad_x of V features from g = weight * grad, with grad_total (null: none) added.
template <class T, int V>
__device__ __forceinline__ void store_grad_x(T* grad_x, const Acc<T> (&g)[V], const Pack<T, V>& x,
                                             Acc<T> rstd, Acc<T> projection, const T* grad_total) {
  Acc<T> values[V];
#pragma unroll
  for (int v = 0; v < V; ++v)
    values[v] = rms_norm_grad_x(g[v], widen(x.value[v]), rstd, projection);
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

// Rows in the registers of their groups. Each block takes every gridDim.x-th set of rows.
template <class T, int V>
__global__ void __launch_bounds__(kMostHeldLanes) backward_held(Backward<T, V> p, int lanes) {
  constexpr int kPacks = kHeld<T, V>;
  using S = Acc<T>;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes;
  const int packs = static_cast<int>(p.features / V);
  S* const scratch = shared_memory<S>();
  int turn = 0;  // successive sums use the two halves of scratch
  S weight_sums[kPacks][V] = {};

  for (int64_t first = block_index() * groups; first < p.rows;
       first += int64_t{gridDim.x} * groups) {
    const int64_t row = first + group;
    const int left = row < p.rows ? packs - lane : 0;
    const T* const x_row = p.x + (left > 0 ? row_offset(p.x_rows, row) + lane * V : 0);
    const T* const grad_row = p.grad + (left > 0 ? row_offset(p.grad_rows, row) + lane * V : 0);
    const S rstd = row < p.rows ? load(p.rstd + row) : S(0);
    Pack<T, V> x[kPacks];
    S g[kPacks][V];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const bool exists = k * lanes < left;
      x[k] = exists ? load<V>(x_row + k * lanes * V) : Pack<T, V>{};
      widen_pack(exists ? load<V>(grad_row + k * lanes * V) : Pack<T, V>{}, g[k]);
    }
    S sum = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        weight_sums[k][v] += rms_norm_grad_weight(g[k][v], widen(x[k].value[v]), rstd);
      }
      if (k * lanes < left) p.weights.scale(g[k], (lane + k * lanes) * V);
#pragma unroll
      for (int v = 0; v < V; ++v) sum += g[k][v] * widen(x[k].value[v]);
    }
    if (p.grad_x == nullptr) continue;
    sum = sum_over_group(sum, lanes, scratch + turn * blockDim.x / kWarp);
    turn ^= 1;
    const S projection = rms_norm_projection(sum, rstd, p.features);
    T* const grad_x = p.grad_x + row * p.features + lane * V;
    const T* const grad_total = p.grad_total != nullptr && left > 0
                                    ? p.grad_total + row_offset(p.grad_total_rows, row) + lane * V
                                    : nullptr;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k * lanes >= left) continue;
      const int64_t offset = k * lanes * V;
      store_grad_x(grad_x + offset, g[k], x[k], rstd, projection,
                   grad_total == nullptr ? nullptr : grad_total + offset);
    }
  }

  if (p.partial == nullptr) return;
  S* const sums = scratch + 2 * blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (k * lanes < packs - lane)
        sums[group * packs * V + (lane + k * lanes) * V + v] = weight_sums[k][v];
    }
  }
  __syncthreads();
  store_share(sums, groups, packs * V, p.partial + blockIdx.x * p.features);
}

// Long rows, first pass: a block for each row's projection.
template <class T, int V>
__global__ void __launch_bounds__(kMostLanes) project(Backward<T, V> p) {
  const int64_t row = block_index();
  if (row >= p.rows) return;
  const T* const x_row = p.x + row_offset(p.x_rows, row);
  const T* const grad_row = p.grad + row_offset(p.grad_rows, row);
  Acc<T> sum = 0;
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < p.features / V; i += kMostLanes) {
    const Pack<T, V> x = load<V>(x_row + i * V);
    Acc<T> g[V];
    widen_pack(load<V>(grad_row + i * V), g);
    p.weights.scale(g, i * V);
#pragma unroll
    for (int v = 0; v < V; ++v) sum += g[v] * widen(x.value[v]);
  }
  sum = sum_over_group(sum, kMostLanes, shared_memory<Acc<T>>());
  if (threadIdx.x == 0) {
    store(p.projections + row, rms_norm_projection(sum, load(p.rstd + row), p.features));
  }
}

// Long rows, second pass: a thread keeps its features and goes down every gridDim.y-th row.
template <class T, int V>
__global__ void __launch_bounds__(kTileThreads, 4) apply(Backward<T, V> p) {
  using S = Acc<T>;
  const int64_t feature = (int64_t{blockIdx.x} * kTileThreads + threadIdx.x) * V;
  if (feature >= p.features) return;
  S weight_sums[V] = {};
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const Pack<T, V> x = load<V>(p.x + row_offset(p.x_rows, row) + feature);
    S g[V];
    widen_pack(load<V>(p.grad + row_offset(p.grad_rows, row) + feature), g);
    const S rstd = load(p.rstd + row);
#pragma unroll
    for (int v = 0; v < V; ++v)
      weight_sums[v] += rms_norm_grad_weight(g[v], widen(x.value[v]), rstd);
    if (p.grad_x == nullptr) continue;
    p.weights.scale(g, feature);
    const T* const grad_total = p.grad_total == nullptr
                                    ? nullptr
                                    : p.grad_total + row_offset(p.grad_total_rows, row) + feature;
    store_grad_x(p.grad_x + row * p.features + feature, g, x, rstd, load(p.projections + row),
                 grad_total);
  }
  if (p.partial == nullptr) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    store(p.partial + blockIdx.y * p.features + feature + v, weight_sums[v]);
  }
}

// The shares' sum, 32 features a block: each of kSlices slices adds every kSlices-th share, then
// the first adds up the slices.
constexpr int kSlices = 16;
template <class W>
__global__ void __launch_bounds__(kWarp* kSlices)
    sum_shares(const Acc<W>* partial, W* grad_weight, int64_t shares, int64_t features) {
  Acc<W>* const sums = shared_memory<Acc<W>>();
  const int column = static_cast<int>(threadIdx.x) % kWarp;
  const int slice = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t feature = block_index() * kWarp + column;
  Acc<W> sum = 0;
  if (feature < features) {
#pragma unroll 4
    for (int64_t share = slice; share < shares; share += kSlices) {
      sum += load(partial + share * features + feature);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || feature >= features) return;
  for (int i = 1; i < kSlices; ++i) sum += sums[i * kWarp + column];
  store(grad_weight + feature, narrow<W>(sum));
}

// How a task is cut: by shape, type and alignment alone.
struct Cut {
  bool held;
  RowGroups groups;  // of held rows
  int64_t shares;  // blocks that sum the weight's gradient: of the grid's x for held rows, of its y
                   // for long ones
};

// Enough blocks to fill a large GPU several times, and at least four rows for each thread to sum.
constexpr int64_t kMostShares = 512, kMostLongShares = 64, kFewestRows = 4;

template <class T, int V>
Cut cut(const RmsNormBackward& task) {
  const int64_t packs = task.features / V;
  Cut result{};
  result.held = packs <= kMostHeldLanes * kHeld<T, V>;
  const bool wants_weight = task.grad_weight != nullptr;
  if (result.held) {
    result.groups = row_groups(packs, kHeld<T, V>, 256);
    const int64_t sets = ceil_div(task.rows, result.groups.groups);
    result.shares = wants_weight ? std::min(ceil_div(sets, kFewestRows), kMostShares)
                                 : std::min(sets, kMostBlocks);
  } else {
    result.shares = std::min(ceil_div(task.rows, kFewestRows), kMostLongShares);
  }
  return result;
}

template <class T, int V>
void run(const RmsNormBackward& task, void* workspace, cudaStream_t stream) {
  using S = Acc<T>;
  Backward<T, V> arguments(task);
  const Cut how = cut<T, V>(task);
  const bool wants_weight = task.grad_weight != nullptr;
  if (wants_weight) arguments.partial = static_cast<S*>(workspace);
  if (task.rows > 0 && how.held) {
    const int groups = how.groups.groups;
    const int64_t scratch = 2 * how.groups.warps() + (wants_weight ? groups * task.features : 0);
    launch(backward_held<T, V>, grid(how.shares), how.groups.threads(), scratch * sizeof(S), stream,
           arguments, how.groups.lanes);
  } else if (task.rows > 0) {
    if (task.grad_x != nullptr) {
      arguments.projections =
          static_cast<S*>(workspace) + (wants_weight ? how.shares * task.features : 0);
      launch(project<T, V>, grid(task.rows), kMostLanes, kMostLanes / kWarp * sizeof(S), stream,
             arguments);
    }
    const dim3 tiles(static_cast<unsigned>(ceil_div(task.features / V, kTileThreads)),
                     static_cast<unsigned>(how.shares));
    launch(apply<T, V>, tiles, kTileThreads, 0, stream, arguments);
  }
  if (!wants_weight) return;
  with_type(task.weight_dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    if constexpr (std::is_same_v<Acc<W>, S>) {
      launch(sum_shares<W>, grid(ceil_div(task.features, kWarp)), kWarp * kSlices,
             kWarp * kSlices * sizeof(S), stream, static_cast<const S*>(workspace),
             static_cast<W*>(task.grad_weight), how.shares, task.features);
    }
  });
}

template <class T>
bool takes_packs(const RmsNormBackward& task) {
  constexpr int kV = kWidth<T>;
  return task.features % kV == 0 && is_aligned(task.grad, task.grad_rows, kV) &&
         is_aligned(task.x, task.x_rows, kV) &&
         (task.grad_total == nullptr || is_aligned(task.grad_total, task.grad_total_rows, kV)) &&
         is_aligned(task.weight) && is_aligned(task.grad_x);
}

// Calls body(Type<T>{}, std::integral_constant<int, V>{}) with the type and the pack that serve the
// task.
template <class Body>
void with_type_and_pack(const RmsNormBackward& task, Body&& body) {
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (takes_packs<T>(task)) {
      body(type, std::integral_constant<int, kWidth<T>>{});
    } else {
      body(type, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

int64_t rms_norm_backward_workspace(const RmsNormBackward& task) {
  int64_t numbers = 0;
  with_type_and_pack(task, [&](auto type, auto pack) {
    const Cut how = cut<typename decltype(type)::type, pack.value>(task);
    if (task.grad_weight != nullptr) numbers += how.shares * task.features;
    if (task.grad_x != nullptr && !how.held) numbers += task.rows;
  });
  return numbers * size_of(accumulation_of(task.dtype));
}

void rms_norm_backward(const RmsNormBackward& task, void* workspace, cudaStream_t stream) {
  if (task.features == 0 || (task.grad_x == nullptr && task.grad_weight == nullptr)) return;
  with_type_and_pack(task, [&](auto type, auto pack) {
    run<typename decltype(type)::type, pack.value>(task, workspace, stream);
  });
}

}  // namespace effkern::cuda
