// How the host starts a kernel: choosing its storage type, the launch itself, dynamic shared
// memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "cuda/memory.cuh"

namespace effkern::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("effkern: ") + what + ": " + cudaGetErrorString(error));
}

constexpr int kWarp = 32;
constexpr int64_t kMostBlocks = 2147483647;  // along the first dimension of a grid

// A grid of at least `blocks` blocks, more than one dimension takes if need be. A kernel counts
// them with `block_index` and lets those past its work return.
inline dim3 grid(int64_t blocks) {
  constexpr int64_t kMostX = kMostBlocks, kMostY = 65535;
  const int64_t y = (blocks + kMostX - 1) / kMostX;
  if (y > kMostY) throw std::runtime_error("effkern: too many rows or chunks for one launch");
  return dim3(static_cast<unsigned>((blocks + y - 1) / y), static_cast<unsigned>(y));
}

__device__ __forceinline__ int64_t block_index() {
  return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
}

// The only launch there is. tests/simt gives it a meaning on the CPU.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
#ifdef EFFKERN_SIMT
  simt::launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes,
               [&] { kernel(arguments...); });
  (void)stream;
#else
  // clang-format off
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  // clang-format on
  check(cudaGetLastError(), "a kernel could not be launched");
#endif
}

// Dynamic shared memory, all the shared memory a kernel has: its size is exact, so tests/simt
// catches an overrun.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef EFFKERN_SIMT
  return static_cast<T*>(simt::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char effkern_shared[];
  return reinterpret_cast<T*>(effkern_shared);
#endif
}

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the storage type that `dtype` names.
template <class Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kFloat64:
      return body(Type<double>{});
    case DType::kBFloat16:
      return body(Type<BFloat16>{});
    case DType::kFloat16:
      return body(Type<Float16>{});
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace effkern::cuda
