// Optimizer state in 8 bits, in blocks of 256 values with a scale each (Dettmers et al., 2022),
// with maps that need no table.
//
//   signed    value = code / 127 * scale, code in [-127, 127], scale the largest magnitude
//   unsigned  value = (code / 255)^2 * scale, code in [0, 255], scale the largest value; a value
//             that is not 0 has a code that is not 0
//
// So a signed value is at most scale / 254 off, and the square root of an unsigned one at most
// sqrt(scale) / 510, where it is not smaller than that itself.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "math/scalar.h"

namespace effkern {

constexpr int64_t kQuantizedBlock = 256;

// The code as a floating-point number that remains to be rounded to the nearest, ties to even;
// `per_scale` is 127 / scale, or 0 where the scale is 0.
template <class V, class S>
EFFKERN_INLINE V signed_code(V value, S per_scale) {
  return value * per_scale;
}
template <class V, class S>
EFFKERN_INLINE V signed_value(V code, S scale) {
  return code * (scale * (S(1) / S(127)));
}

// `per_root` is 255 / sqrt(scale), or 0. To be rounded, and then raised to 1 where the value is not
// 0.
template <class V, class S>
EFFKERN_INLINE V unsigned_code(V value, S per_root) {
  return square_root(value) * per_root;
}
template <class V, class S>
EFFKERN_INLINE V unsigned_value(V code, S scale) {
  return code * code * (scale * (S(1) / S(65025)));
}

}  // namespace effkern
