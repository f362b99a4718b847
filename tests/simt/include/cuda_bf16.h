// Stands in for CUDA's header of this name: bfloat16 as bits, and its conversions.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t word = uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &word, sizeof(result));
  return result;
}

// To nearest even.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof(word));
  if (x != x) return {0x7fff};
  word += 0x7fff + ((word >> 16) & 1);
  return {static_cast<uint16_t>(word >> 16)};
}
