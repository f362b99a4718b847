// The exponential of a vector, for numbers up to 0 and NaN: what a softmax takes it of.
#pragma once

#include "cpu/simd.h"

namespace effkern {

template <class V>
struct ExponentialOf;
template <>
struct ExponentialOf<Floats> {
  using Bits = Ints;
  static constexpr int kFractionBits = 23, kExponentBias = 127, kSubnormal = 64;
  static constexpr float kLeast = -104.0f;  // below it stands 0
  static constexpr float kRound = 0x1.8p23f;
  // ln 2 in two parts; the first has few digits, so that its product with a whole number is exact.
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  static constexpr float kSmall = 0x1p-64f;
  static constexpr int kDegree = 7;
};
template <>
struct ExponentialOf<Doubles> {
  using Bits = VectorOf<int64_t, EFFKERN_VECTOR_BYTES>::Type;
  static constexpr int kFractionBits = 52, kExponentBias = 1023, kSubnormal = 64;
  static constexpr double kLeast = -746.0;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kSmall = 0x1p-64;
  static constexpr int kDegree = 13;
};

// Within one unit in the last place: with n = round(x / ln 2) and r = x - n ln 2, e^x is 2^n times
// the Taylor polynomial of e^r, whose remainder is far below a rounding for |r| <= ln 2 / 2.
template <class V>
EFFKERN_INLINE V exponential_of(V x) {
  using E = ExponentialOf<V>;
  using Bits = typename E::Bits;
  using S = std::remove_cvref_t<decltype(x[0])>;
  x = x < E::kLeast ? V{} + E::kLeast : x;
  // Adding kRound leaves the nearest whole number in the lowest bits.
  const V shifted = x * S(1.442695040888963407359924681) + E::kRound;
  const V n = shifted - E::kRound;
  const V r = (x - n * E::kLn2High) - n * E::kLn2Low;

  S inverse_factorials[E::kDegree + 1] = {1};
  for (int k = 1; k <= E::kDegree; ++k) inverse_factorials[k] = inverse_factorials[k - 1] / S(k);
  V sum = V{} + inverse_factorials[E::kDegree];
  for (int k = E::kDegree - 1; k >= 0; --k) sum = sum * r + inverse_factorials[k];

  // Where the result is subnormal 2^n has no exponent of its own: 2^(n + 64) has.
  const Bits whole = bit_cast<Bits>(shifted) - bit_cast<Bits>(V{} + E::kRound);
  const Bits power = (whole + (E::kExponentBias + E::kSubnormal)) << E::kFractionBits;
  return sum * bit_cast<V>(power) * E::kSmall;
}

EFFKERN_INLINE Floats exponential(Floats x) { return exponential_of(x); }
EFFKERN_INLINE Doubles exponential(Doubles x) { return exponential_of(x); }

}  // namespace effkern
