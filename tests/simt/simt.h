// CUDA's words with a meaning on the CPU, so that the unmodified sources in csrc/cuda and
// csrc/torch/cuda*.cpp compile with g++ and run here (simt.cpp). Included before everything else.
//
// A thread is a fiber. Blocks run one after the other in a shuffled order; so do the warps of a
// block, each as far ahead of the others as barriers allow, and the threads of a warp. Shared
// memory has exactly the size asked for and starts as NaNs; so does every tensor that a binding
// allocates.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

struct Thread {
  dim3 index, block, block_size, grid_size;
};
extern Thread current;

struct Counts {
  int64_t bytes_read, bytes_written, launches, bytes_uploaded;
};
extern Counts counts;

using Body = void (*)(void* context);
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body,
            void* context);
void* shared_memory();
void wait_for_block();
// The 8 bytes that lane `from` of the caller's warp passed to the same call.
uint64_t exchange_in_warp(uint64_t mine, int from);
int lane();
[[noreturn]] void fail(const char* what);

template <class Call>
void launch(const void* kernel, dim3 grid, int threads, size_t shared_bytes, Call call) {
  launch(
      kernel, grid, dim3(static_cast<unsigned>(threads)), shared_bytes,
      [](void* context) { (*static_cast<Call*>(context))(); }, &call);
}

}  // namespace simt

#define threadIdx (::simt::current.index)
#define blockIdx (::simt::current.block)
#define blockDim (::simt::current.block_size)
#define gridDim (::simt::current.grid_size)

#define EFFKERN_COUNT_READ(bytes) (::simt::counts.bytes_read += static_cast<int64_t>(bytes))
#define EFFKERN_COUNT_WRITE(bytes) (::simt::counts.bytes_written += static_cast<int64_t>(bytes))

template <class Word>
void __stwb(Word* p, Word value) {
  *p = value;
}

inline void __syncthreads() { simt::wait_for_block(); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// One thread runs at a time, so a read and a write are one piece, and each sees all before it.
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  const unsigned old = *p;
  *p = old >= last ? 0 : old + 1;
  return old;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  if (mask != 0xffffffffu) simt::fail("a shuffle among part of a warp is not supported here");
  uint64_t word = 0;
  __builtin_memcpy(&word, &value, sizeof(value));
  word = simt::exchange_in_warp(word, from);
  __builtin_memcpy(&value, &word, sizeof(value));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  return __shfl_sync(mask, value, simt::lane() ^ offset);
}

// To the nearest, ties to even; 0 for NaN, and the nearest there is for what int does not hold.
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return 2147483647;
  if (x < -2147483648.0f) return -2147483647 - 1;
  return static_cast<int>(__builtin_nearbyintf(x));
}

// The few calls of CUDA's runtime that the sources make.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t);
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  __builtin_memset(to, value, bytes);
  return cudaSuccess;
}

// What the bindings ask of torch about CUDA, and for memory: see simt_torch.cpp.
#define aoti_torch_create_cuda_guard simt_create_cuda_guard
#define aoti_torch_delete_cuda_guard simt_delete_cuda_guard
#define aoti_torch_get_current_cuda_stream simt_get_current_cuda_stream
#define aoti_torch_empty_strided simt_empty_strided
