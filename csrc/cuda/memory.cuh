// The one way from a kernel to global memory, and the storage types it converts.
//
// Every access goes through `load` and `store`, so that tests/simt, which runs these sources on the
// CPU, can count the bytes that a kernel moves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"

#ifndef EFFKERN_SIMT
#define EFFKERN_COUNT_READ(bytes)
#define EFFKERN_COUNT_WRITE(bytes)
#endif

namespace effkern::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// What a storage type is computed in.
template <class T>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<double> {
  using Type = double;
};
template <class T>
using Acc = typename Accumulation<T>::Type;

// Elements of T in the widest access, 16 bytes.
template <class T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(Float16 x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T narrow(Acc<T> x) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// Tells the compiler what it cannot see of an address that was itself read from memory: that it is
// one of global memory, for which there are instructions of its own.
__device__ __forceinline__ void assume_global(const void* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#else
  (void)p;
#endif
}

template <class T, int V>
struct Pack {
  T value[V];
};

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = unsigned char;
};
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// V elements from an address that is a multiple of their size, or of 16 bytes where they are more
// than that.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  Pack<T, V> pack;
  if constexpr (V > kWidth<T>) {
#pragma unroll
    for (int part = 0; part < V; part += kWidth<T>) {
      const Pack<T, kWidth<T>> some = load<kWidth<T>>(p + part);
      memcpy(pack.value + part, some.value, sizeof(some));
    }
  } else {
    assume_global(p);
    const auto word = *reinterpret_cast<const typename Word<sizeof(pack)>::Type*>(p);
    EFFKERN_COUNT_READ(sizeof(pack));
    memcpy(pack.value, &word, sizeof(pack));
  }
  return pack;
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
  if constexpr (V > kWidth<T>) {
#pragma unroll
    for (int part = 0; part < V; part += kWidth<T>) {
      Pack<T, kWidth<T>> some;
      memcpy(some.value, pack.value + part, sizeof(some));
      store(p + part, some);
    }
  } else {
    typename Word<sizeof(pack)>::Type word;
    memcpy(&word, pack.value, sizeof(pack));
    // An ordinary store, but one that the compiler does not split into its elements.
    __stwb(reinterpret_cast<decltype(word)*>(p), word);
    EFFKERN_COUNT_WRITE(sizeof(pack));
  }
}

// The same for one number.
template <class T>
__device__ __forceinline__ T load(const T* p) {
  return load<1>(p).value[0];
}
template <class T>
__device__ __forceinline__ void store(T* p, T value) {
  store(p, Pack<T, 1>{{value}});
}

// Counts up, and from `last` back to 0, in one piece with respect to other blocks. Returns what
// stood there.
__device__ __forceinline__ unsigned take_ticket(unsigned* ticket, unsigned last) {
  assume_global(ticket);
  EFFKERN_COUNT_READ(sizeof(unsigned));
  EFFKERN_COUNT_WRITE(sizeof(unsigned));
  return atomicInc(ticket, last);
}

}  // namespace effkern::cuda
