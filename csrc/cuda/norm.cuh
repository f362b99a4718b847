// What the forward and the backward kernels share.
#pragma once

#include "common/norm.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/norm.h"
#include "cuda/row_group.cuh"
#include "math/norm.h"

namespace effkern::cuda {

// The most threads that share a row.
constexpr int kMostLanes = 1024;

template <class T, int V>
struct Parameters {
  const void* weight;
  const void* bias;
  bool in_storage_type;

  // Multiplies `values` by the weights of the features from `feature` on; without weights does
  // nothing.
  __device__ __forceinline__ void scale(Acc<T> (&values)[V], int64_t feature) const {
    with(weight, feature, [&](const auto& pack) {
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] *= widen(pack.value[v]);
    });
  }
  // Adds the biases, where there are any.
  __device__ __forceinline__ void shift(Acc<T> (&values)[V], int64_t feature) const {
    with(bias, feature, [&](const auto& pack) {
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] += widen(pack.value[v]);
    });
  }
  // From y to xhat.
  __device__ __forceinline__ void undo(Acc<T> (&values)[V], int64_t feature,
                                       NormBounds<Acc<T>> bounds) const {
    Acc<T> biases[V] = {};
    shift(biases, feature);
    with(weight, feature, [&](const auto& pack) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] = xhat_of(values[v], widen(pack.value[v]), biases[v], bounds);
      }
    });
  }

 private:
  template <class Body>
  __device__ __forceinline__ void with(const void* data, int64_t feature, const Body& body) const {
    if (data == nullptr) return;
    if (in_storage_type) {
      body(load<V>(static_cast<const T*>(data) + feature));
    } else if constexpr (sizeof(T) < sizeof(Acc<T>)) {
      body(load<V>(static_cast<const Acc<T>*>(data) + feature));
    }
  }
};

// The numbers kept of a row: where there are two, all rows' first ones stand before the others.
template <class N, class S>
__device__ __forceinline__ void store_kept(S* statistics, int64_t rows, int64_t row,
                                           NormRow<S> kept) {
  if constexpr (N::kNumbers == 2) store(statistics + row, kept.first);
  store(statistics + (N::kNumbers - 1) * rows + row, kept.rstd);
}
template <class N, class S>
__device__ __forceinline__ NormRow<S> load_kept(const S* statistics, int64_t rows, int64_t row) {
  NormRow<S> kept{};
  if constexpr (N::kNumbers == 2) kept.first = load(statistics + row);
  kept.rstd = load(statistics + (N::kNumbers - 1) * rows + row);
  return kept;
}

// The sums of a group of threads, the first kSums of the two; see sum_over_group.
template <int kSums, class S>
__device__ __forceinline__ NormSums<S> sums_over_group(NormSums<S> sums, int lanes, S* scratch) {
  if constexpr (kSums == 2) {
    S values[2] = {sums.first, sums.second};
    sum_over_group(values, lanes, scratch);
    return {values[0], values[1]};
  } else {
    S values[1] = {sums.first};
    sum_over_group(values, lanes, scratch);
    return {values[0], S(0)};
  }
}

// Whether rows from `data` on can be read in accesses of 16 bytes.
inline bool is_aligned(const void* data, const RowLayout& rows, int64_t width) {
  return is_aligned(data) && rows.stride0 % width == 0 && rows.stride1 % width == 0 &&
         rows.stride2 % width == 0;
}

}  // namespace effkern::cuda
