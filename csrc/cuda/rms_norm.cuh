// What the forward and the backward kernels share.
#pragma once

#include "common/rms_norm.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace effkern::cuda {

// The most threads that share a row.
constexpr int kMostLanes = 1024;

template <class T, int V>
struct Weights {
  const void* data;
  bool in_storage_type;

  // Multiplies `values` by the weights of the features from `feature` on; without weights does
  // nothing.
  __device__ __forceinline__ void scale(Acc<T> (&values)[V], int64_t feature) const {
    if (data == nullptr) return;
    if (in_storage_type) {
      scale_by(values, load<V>(static_cast<const T*>(data) + feature));
    } else if constexpr (sizeof(T) < sizeof(Acc<T>)) {
      scale_by(values, load<V>(static_cast<const Acc<T>*>(data) + feature));
    }
  }

 private:
  template <class W>
  static __device__ __forceinline__ void scale_by(Acc<T> (&values)[V], const Pack<W, V>& weights) {
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] *= widen(weights.value[v]);
  }
};

// Whether rows from `data` on can be read in accesses of 16 bytes.
inline bool is_aligned(const void* data, const RowLayout& rows, int64_t width) {
  return is_aligned(data) && rows.stride0 % width == 0 && rows.stride1 % width == 0 &&
         rows.stride2 % width == 0;
}

}  // namespace effkern::cuda
