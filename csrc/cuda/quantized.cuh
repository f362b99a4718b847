// A stretch of values in 8 bits with one scale (math/quantize.h), and of parameters rounded
// stochastically to bfloat16 (math/rounding.h).
#pragma once

#include "cuda/lane_values.cuh"
#include "math/quantize.h"
#include "math/rounding.h"

namespace effkern::cuda {

static_assert(kStretch == kQuantizedBlock);

__device__ __forceinline__ uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <bool kSigned>
__device__ __forceinline__ void dequantize(const Words& words, float scale, Values& values) {
  Pack<std::conditional_t<kSigned, signed char, unsigned char>, kLaneValues> codes;
  memcpy(&codes, &words, sizeof(codes));
#pragma unroll
  for (int v = 0; v < kLaneValues; ++v) {
    const float code = static_cast<float>(codes.value[v]);
    values[v] = kSigned ? signed_value(code, scale) : unsigned_value(code, scale);
  }
}

// The largest magnitude of the first `count` of a stretch's values, the same in all lanes. As bits,
// magnitudes are ordered like integers, NaN above all.
template <bool kWhole>
__device__ __forceinline__ float largest_magnitude(const Values& values, int count) {
  uint32_t most = 0;
#pragma unroll
  for (int v = 0; v < kLaneValues; ++v) {
    const uint32_t magnitude = bits_of(values[v]) & 0x7fffffffu;
    if ((kWhole || place_of<kWhole>(v) < count) && magnitude > most) most = magnitude;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, most, offset);
    most = other > most ? other : most;
  }
  float largest;
  memcpy(&largest, &most, sizeof(largest));
  return largest;
}

template <bool kSigned>
__device__ __forceinline__ Words quantize(const Values& values, float scale) {
  const float factor = kSigned ? codes_per_scale(scale) : codes_per_root(scale);
  Pack<unsigned char, kLaneValues> codes;
#pragma unroll
  for (int v = 0; v < kLaneValues; ++v) {
    const float value = values[v];
    int code = __float2int_rn(kSigned ? signed_code(value, factor)
                                      : unsigned_code(square_root(value), factor));
    if (!kSigned && value > 0.0f && code == 0) code = 1;
    codes.value[v] = static_cast<unsigned char>(code);
  }
  Words words = {};
  memcpy(&words, &codes, sizeof(codes));
  return words;
}

// `first`: the lower 32 bits of the index that the stretch's first value has in its tensor.
template <bool kWhole>
__device__ __forceinline__ Words narrow_stochastically(const Values& values, uint32_t stream,
                                                       uint32_t first) {
  Pack<unsigned short, kLaneValues> halves;
#pragma unroll
  for (int v = 0; v < kLaneValues; ++v) {
    const uint32_t bits = bits_of(values[v]);
    const uint32_t random = random_bits(stream, first + static_cast<uint32_t>(place_of<kWhole>(v)));
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    const BFloat16 nearest = narrow<BFloat16>(values[v]);
    memcpy(&halves.value[v], &nearest, sizeof(nearest));
    if (finite) {
      halves.value[v] = static_cast<unsigned short>(round_stochastically(bits, random));
    }
  }
  Words words = {};
  memcpy(&words, &halves, sizeof(halves));
  return words;
}

}  // namespace effkern::cuda
