// Stochastic rounding to bfloat16: up or down with probabilities that keep the mean. The random
// bits are a hash of a tensor's key, the number of the step and the element's index, so that every
// backend rounds alike and nothing but the key must be kept.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace effkern {

// A bijective hash of 32 bits (C. Wellons, "hash prospector", lowbias32). V is uint32_t or a vector
// of it.
template <class V>
EFFKERN_INLINE V mix_bits(V x) {
  x = x ^ (x >> 16);
  x = x * 0x7feb352du;
  x = x ^ (x >> 15);
  x = x * 0x846ca68bu;
  return x ^ (x >> 16);
}

// For one tensor and step.
EFFKERN_INLINE uint32_t rounding_seed(int64_t key, double t) {
  const uint64_t bits = static_cast<uint64_t>(key);
  uint32_t h = mix_bits(static_cast<uint32_t>(bits));
  h = mix_bits(h ^ static_cast<uint32_t>(bits >> 32));
  return mix_bits(h ^ static_cast<uint32_t>(static_cast<int64_t>(t)));
}

// For the elements whose index has these upper 32 bits.
EFFKERN_INLINE uint32_t rounding_stream(uint32_t seed, uint32_t upper_index) {
  return seed ^ mix_bits(upper_index);
}

// For one element; `lower_index` is a number or a vector of them.
template <class V>
EFFKERN_INLINE V random_bits(uint32_t stream, V lower_index) {
  return mix_bits(lower_index * 0x9e3779b9u + stream);
}

// The bits of a bfloat16 from those of a finite float32: added below the last bit that is kept,
// 16 random bits carry into it as often as the rest of the number is large. Infinity and NaN must
// not come here.
template <class V>
EFFKERN_INLINE V round_stochastically(V float_bits, V random) {
  return (float_bits + (random & 0xffffu)) >> 16;
}

}  // namespace effkern
