// Stretches of 256 numbers of one array, eight to a lane of a warp, in whatever dtype they are
// stored: how they come from memory, what they are in float32, and how they go back.
//
// A whole stretch at a suitable address is moved in accesses of 16 bytes, 8 for numbers of 8 bits;
// a lane then has eight numbers in a row. Elsewhere they are moved one by one, and a lane has every
// 32nd. `kWhole` says which.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace effkern::cuda {

constexpr int kLaneValues = 8;
constexpr int kStretch = kWarp * kLaneValues;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

// The place of a lane's number v in its stretch.
template <bool kWhole>
__device__ __forceinline__ int place_of(int v) {
  return kWhole ? lane_index() * kLaneValues + v : lane_index() + v * kWarp;
}

// A lane's numbers as they are stored, one behind the other.
struct Words {
  uint32_t at[kLaneValues];
};
using Values = float[kLaneValues];

template <int kBytes>
struct Bits;
template <>
struct Bits<1> {
  using Type = unsigned char;
};
template <>
struct Bits<2> {
  using Type = unsigned short;
};
template <>
struct Bits<4> {
  using Type = unsigned int;
};

// Of numbers of kBytes bytes, the first `count` of the stretch at `p`; 0 behind them.
template <bool kWhole, int kBytes>
__device__ __forceinline__ Words load_words(const char* p, int count) {
  using Number = typename Bits<kBytes>::Type;
  Words words = {};
  if constexpr (kWhole) {
    constexpr int kWords = kLaneValues * kBytes / 4;
    const auto pack =
        load<kWords>(reinterpret_cast<const uint32_t*>(p) + lane_index() * int64_t{kWords});
    memcpy(&words, &pack, sizeof(pack));
  } else {
#pragma unroll
    for (int v = 0; v < kLaneValues; ++v) {
      const int place = place_of<kWhole>(v);
      if (place >= count) continue;
      const Number number = load(reinterpret_cast<const Number*>(p) + place);
      memcpy(reinterpret_cast<char*>(&words) + v * kBytes, &number, kBytes);
    }
  }
  return words;
}

template <bool kWhole, int kBytes>
__device__ __forceinline__ void store_words(char* p, int count, const Words& words) {
  using Number = typename Bits<kBytes>::Type;
  if constexpr (kWhole) {
    constexpr int kWords = kLaneValues * kBytes / 4;
    Pack<uint32_t, kWords> pack;
    memcpy(&pack, &words, sizeof(pack));
    store(reinterpret_cast<uint32_t*>(p) + lane_index() * int64_t{kWords}, pack);
  } else {
#pragma unroll
    for (int v = 0; v < kLaneValues; ++v) {
      const int place = place_of<kWhole>(v);
      if (place >= count) continue;
      Number number;
      memcpy(&number, reinterpret_cast<const char*>(&words) + v * kBytes, kBytes);
      store(reinterpret_cast<Number*>(p) + place, number);
    }
  }
}

// ---- numbers of a floating-point dtype, which is the same for all threads ----

__device__ __forceinline__ int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Apart from `widen`, so that all arrays are on their way before the first is needed.
template <bool kWhole>
__device__ __forceinline__ Words load_words(const char* p, DType dtype, int count) {
  return dtype == DType::kFloat32 ? load_words<kWhole, 4>(p, count)
                                  : load_words<kWhole, 2>(p, count);
}

template <bool kWhole>
__device__ __forceinline__ void store_words(char* p, DType dtype, int count, const Words& words) {
  if (dtype == DType::kFloat32) return store_words<kWhole, 4>(p, count, words);
  store_words<kWhole, 2>(p, count, words);
}

template <class T>
__device__ __forceinline__ void widen_from(const Words& words, Values& values) {
  Pack<T, kLaneValues> pack;
  memcpy(&pack, &words, sizeof(pack));
#pragma unroll
  for (int v = 0; v < kLaneValues; ++v) values[v] = widen(pack.value[v]);
}

__device__ __forceinline__ void widen(const Words& words, DType dtype, Values& values) {
  if (dtype == DType::kFloat32) return widen_from<float>(words, values);
  if (dtype == DType::kBFloat16) return widen_from<BFloat16>(words, values);
  widen_from<Float16>(words, values);
}

template <class T>
__device__ __forceinline__ Words narrow_to(const Values& values) {
  Pack<T, kLaneValues> pack;
#pragma unroll
  for (int v = 0; v < kLaneValues; ++v) pack.value[v] = narrow<T>(values[v]);
  Words words = {};
  memcpy(&words, &pack, sizeof(pack));
  return words;
}

// Rounds to nearest even.
__device__ __forceinline__ Words narrow(const Values& values, DType dtype) {
  if (dtype == DType::kFloat32) return narrow_to<float>(values);
  if (dtype == DType::kBFloat16) return narrow_to<BFloat16>(values);
  return narrow_to<Float16>(values);
}

}  // namespace effkern::cuda
