// Blocks of values in float32, beside each other in the first-level cache, and how they are brought
// there from other dtypes and back. cpu/kernels/isa.h must come first.
#pragma once

#include "cpu/kernels.h"
#include "math/quantize.h"
#include "math/rounding.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

constexpr int64_t kBlock = kQuantizedBlock;
static_assert(kChunk % kBlock == 0 && kBlock % (4 * kLanes<float>) == 0);

// One block of a tensor's values; behind its end they are 0.
struct Values {
  alignas(64) float of[kBlock];
};

// ---- floating-point storage ----

template <class T>
void widen(const T* from, int64_t count, Values& to) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store(to.of + i, load(from + i));
  if (i < count) {
    store(to.of + i, load_first(from + i, count - i));
    i += kLanes<float>;
  }
  for (; i < kBlock; i += kLanes<float>) store(to.of + i, Floats{});
}

// `from` may be read up to the end of its last vector.
template <class T>
void narrow(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load(from + i), count - i);
}

// ---- stochastic rounding ----

EFFKERN_INLINE Words lane_numbers() {
  Words lanes = {};
  for (uint32_t i = 0; i < kLanes<float>; ++i) lanes[i] = i;
  return lanes;
}

// `index` is that of the block's first element in its tensor.
inline void narrow_stochastically(const float* from, int64_t count, uint32_t seed, int64_t index,
                                  BFloat16* to) {
  const uint64_t first = static_cast<uint64_t>(index);
  const uint32_t stream = rounding_stream(seed, static_cast<uint32_t>(first >> 32));
  Words lower = lane_numbers() + static_cast<uint32_t>(first);
  for (int64_t i = 0; i < count;
       i += kLanes<float>, lower += static_cast<uint32_t>(kLanes<float>)) {
    const Floats x = load(from + i);
    const Words bits = bit_cast<Words>(x);
    const Words rounded = round_stochastically(bits, random_bits(stream, lower));
    const Words nearest = widened(to_bfloat16(x));
    const Words finite = bit_cast<Words>((bits & 0x7f800000u) != 0x7f800000u);
    const Halves chosen = narrowed((rounded & finite) | (nearest & ~finite));
    const int64_t left = count - i;
    __builtin_memcpy(to + i, &chosen,
                     static_cast<size_t>(left < kLanes<float> ? left : kLanes<float>) * 2);
  }
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
