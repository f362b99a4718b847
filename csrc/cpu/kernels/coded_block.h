// A block of a state's values in 8 bits: to float32 a vector at a time, and back as a whole, when
// its largest magnitude is known (math/quantize.h). cpu/kernels/isa.h must come first.
#pragma once

#include "cpu/kernels/block.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

EFFKERN_INLINE Floats decoded(const uint8_t* codes, float scale, bool is_signed) {
  if (is_signed) {
    const Ints code = load_codes(reinterpret_cast<const int8_t*>(codes));
    return signed_value(__builtin_convertvector(code, Floats), scale);
  }
  return unsigned_value(__builtin_convertvector(load_codes(codes), Floats), scale);
}

// As bits, magnitudes of float32 are ordered like integers, NaN above all.
EFFKERN_INLINE Words larger_magnitude(Words most, Floats x) {
  const Words bits = bit_cast<Words>(x) & 0x7fffffffu;
  return bits > most ? bits : most;
}
// Lane i of v at lane i ^ distance.
EFFKERN_INLINE Words exchanged(Words v, uint32_t distance) {
#if defined(__clang__)  // has no __builtin_shuffle, and makes one of this
  Words lanes;
  for (uint32_t i = 0; i < kLanes<float>; ++i) lanes[i] = v[i ^ distance];
  return lanes;
#else
  return __builtin_shuffle(v, lane_numbers() ^ distance);
#endif
}
EFFKERN_INLINE float largest_lane(Words most) {
  for (uint32_t half = kLanes<float> / 2; half > 0; half /= 2) {
    const Words other = exchanged(most, half);
    most = other > most ? other : most;
  }
  return bit_cast<float>(static_cast<uint32_t>(most[0]));
}

// What of a value its code is proportional to.
EFFKERN_INLINE Floats coded_part(Floats value, bool is_signed) {
  return is_signed ? value : square_root(value);
}

// Below 2^22 the sum's lowest bits are those of the nearest integer, ties to even.
constexpr float kRounds = 12582912.0f;
constexpr int32_t kRoundsBits = 0x4b400000;

EFFKERN_INLINE Ints code_of(Floats part, float factor, bool is_signed) {
  if (is_signed) return bit_cast<Ints>(signed_code(part, factor) + kRounds);
  const Ints code = bit_cast<Ints>(unsigned_code(part, factor) + kRounds);
  const Ints least = kRoundsBits - (bit_cast<Ints>(part) > 0);  // true is -1
  return code > least ? code : least;
}

// What `coded_part` is multiplied by, for a block whose largest magnitude is `scale`.
EFFKERN_INLINE float codes_per_part(float scale, bool is_signed) {
  return is_signed ? codes_per_scale(scale) : codes_per_root(scale);
}

// How many codes are made and stored together.
constexpr int64_t kCodes = 4 * kLanes<float>;

// The codes of values `i` to `i + kCodes`, of which `parts` are the `coded_part`.
EFFKERN_INLINE void encode(const Values& parts, int64_t i, float factor, bool is_signed,
                           uint8_t* codes) {
  Ints four[4];
  for (int j = 0; j < 4; ++j) {
    four[j] = code_of(load(parts.of + i + j * kLanes<float>), factor, is_signed);
  }
  store_codes(codes + i, four);
}

// The codes of the first `count` values; behind them `parts` may be anything.
EFFKERN_INLINE void encode_first(const Values& parts, int64_t count, float factor, bool is_signed,
                                 uint8_t* codes) {
  alignas(64) uint8_t padded[kBlock];
  uint8_t* const made = count < kBlock ? padded : codes;
  for (int64_t i = 0; i < count; i += kCodes) encode(parts, i, factor, is_signed, made);
  if (count < kBlock) __builtin_memcpy(codes, padded, static_cast<size_t>(count));
}

// The codes of a block, copied out where it is not whole, so that they can be read as one.
class Codes {
 public:
  const uint8_t* at(const uint8_t* codes, int64_t count) {
    if (count == kBlock) return codes;
    __builtin_memset(copy_, 0, kBlock);
    __builtin_memcpy(copy_, codes, static_cast<size_t>(count));
    return copy_;
  }

 private:
  uint8_t copy_[kBlock];
};

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
