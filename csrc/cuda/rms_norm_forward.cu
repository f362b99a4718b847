// RMSNorm forward, with the residual added first where there is one.
//
// Bytes: x and residual are read once, y, total and rstd written once. The weight is read for each
// row, from cache. Rows of more than 16,384 features (8,192 in float64) do not fit in the registers
// of a block: x, or the total just written, is read a second time.
//
// Occupancy: 1,024 threads a multiprocessor, so at most 64 registers a thread.
#include "cuda/memory.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rms_norm.h"
#include "cuda/row_group.cuh"
#include "math/rms_norm.h"

namespace effkern::cuda {
namespace {

// How many packs of V elements a thread holds: 64 bytes, and as many elements of a 16-bit type as
// of float32.
template <class T, int V>
constexpr int kHeld = (sizeof(T) == 8 ? 8 : 16) / V;

// The task with types, as kernel arguments.
template <class T, int V>
struct Forward {
  const T* x;
  const T* residual;
  T* y;
  T* total;
  Acc<T>* rstd;
  Weights<T, V> weights;
  RowLayout x_rows, residual_rows;
  int64_t rows, features;
  Acc<T> eps;

  explicit Forward(const RmsNormForward& task)
      : x(static_cast<const T*>(task.x)),
        residual(static_cast<const T*>(task.residual)),
        y(static_cast<T*>(task.y)),
        total(static_cast<T*>(task.total)),
        rstd(static_cast<Acc<T>*>(task.rstd)),
        weights{task.weight, task.weight_dtype == task.dtype},
        x_rows(task.x_rows),
        residual_rows(task.residual_rows),
        rows(task.rows),
        features(task.features),
        eps(static_cast<Acc<T>>(task.eps)) {}
};

template <class T, int V>
__device__ __forceinline__ Acc<T> sum_of_squares(const Pack<T, V>& pack) {
  Acc<T> sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += widen(pack.value[v]) * widen(pack.value[v]);
  return sum;
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> add(const Pack<T, V>& a, const Pack<T, V>& b) {
  Pack<T, V> sum;
#pragma unroll
  for (int v = 0; v < V; ++v) sum.value[v] = narrow<T>(widen(a.value[v]) + widen(b.value[v]));
  return sum;
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> normalise(const Pack<T, V>& pack, Acc<T> rstd,
                                                const Weights<T, V>& weights, int64_t feature) {
  Acc<T> values[V];
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = widen(pack.value[v]) * rstd;
  weights.scale(values, feature);
  Pack<T, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) result.value[v] = narrow<T>(values[v]);
  return result;
}

// A row in the registers of its group.
template <class T, int V>
__global__ void __launch_bounds__(kMostLanes) forward_held(Forward<T, V> p, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t row = block_index() * (blockDim.x / lanes) + threadIdx.x / lanes;
  // Of this thread's packs, lane, lane + lanes, ..., number k exists where k * lanes < left. Groups
  // past the last row have none; they go along because all threads meet in the sum.
  const int left = row < p.rows ? static_cast<int>(p.features / V) - lane : 0;
  Pack<T, V> held[kHeld<T, V>];
  const T* const x = p.x + (left > 0 ? row_offset(p.x_rows, row) + lane * V : 0);
#pragma unroll
  for (int k = 0; k < kHeld<T, V>; ++k) {
    held[k] = k * lanes < left ? load<V>(x + k * lanes * V) : Pack<T, V>{};
  }
  if (p.residual != nullptr && left > 0) {
    const T* const residual = p.residual + row_offset(p.residual_rows, row) + lane * V;
    T* const total = p.total + row * p.features + lane * V;
    // Several loads before the first store, which would hold them up.
    constexpr int kBatch = kHeld<T, V> < 4 ? kHeld<T, V> : 4;
#pragma unroll
    for (int batch = 0; batch < kHeld<T, V>; batch += kBatch) {
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
  Acc<T> sum = 0;
#pragma unroll
  for (int k = 0; k < kHeld<T, V>; ++k) sum += sum_of_squares(held[k]);
  sum = sum_over_group(sum, lanes, shared_memory<Acc<T>>());
  if (row >= p.rows) return;
  const Acc<T> rstd = rms_norm_rstd(sum, p.features, p.eps);
  if (lane == 0) store(p.rstd + row, rstd);
  T* const y = p.y + row * p.features + lane * V;
#pragma unroll
  for (int k = 0; k < kHeld<T, V>; ++k) {
    if (k * lanes >= left) continue;
    store(y + k * lanes * V, normalise(held[k], rstd, p.weights, (lane + k * lanes) * V));
  }
}

// A row too long for registers: read by its block once for the sum and once more for the result.
template <class T, int V>
__global__ void __launch_bounds__(kMostLanes) forward_twice(Forward<T, V> p) {
  const int64_t row = block_index();
  if (row >= p.rows) return;
  const int64_t packs = p.features / V;
  const T* source = p.x + row_offset(p.x_rows, row);
  Acc<T> sum = 0;
  if (p.residual == nullptr) {
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < packs; i += kMostLanes) {
      sum += sum_of_squares(load<V>(source + i * V));
    }
  } else {
    const T* const residual = p.residual + row_offset(p.residual_rows, row);
    T* const total = p.total + row * p.features;
    for (int64_t i = threadIdx.x; i < packs; i += kMostLanes) {
      const Pack<T, V> pack = add(load<V>(source + i * V), load<V>(residual + i * V));
      store(total + i * V, pack);
      sum += sum_of_squares(pack);
    }
    source = total;  // each thread reads what it wrote itself
  }
  sum = sum_over_group(sum, kMostLanes, shared_memory<Acc<T>>());
  const Acc<T> rstd = rms_norm_rstd(sum, p.features, p.eps);
  if (threadIdx.x == 0) store(p.rstd + row, rstd);
  T* const y = p.y + row * p.features;
  for (int64_t i = threadIdx.x; i < packs; i += kMostLanes) {
    store(y + i * V, normalise(load<V>(source + i * V), rstd, p.weights, i * V));
  }
}

template <class T, int V>
void run(const RmsNormForward& task, cudaStream_t stream) {
  const Forward<T, V> arguments(task);
  const int64_t packs = task.features / V;
  if (packs > kMostLanes * kHeld<T, V>) {
    launch(forward_twice<T, V>, grid(task.rows), kMostLanes, kMostLanes / kWarp * sizeof(Acc<T>),
           stream, arguments);
    return;
  }
  const RowGroups groups = row_groups(packs, kHeld<T, V>, 128);
  launch(forward_held<T, V>, grid(ceil_div(task.rows, groups.groups)), groups.threads(),
         groups.warps() * sizeof(Acc<T>), stream, arguments, groups.lanes);
}

template <class T>
bool takes_packs(const RmsNormForward& task) {
  constexpr int kV = kWidth<T>;
  return task.features % kV == 0 && is_aligned(task.x, task.x_rows, kV) &&
         (task.residual == nullptr || is_aligned(task.residual, task.residual_rows, kV)) &&
         is_aligned(task.weight) && is_aligned(task.y) && is_aligned(task.total);
}

}  // namespace

void rms_norm_forward(const RmsNormForward& task, cudaStream_t stream) {
  if (task.rows == 0) return;
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (takes_packs<T>(task)) {
      run<T, kWidth<T>>(task, stream);
    } else {
      run<T, 1>(task, stream);
    }
  });
}

}  // namespace effkern::cuda
