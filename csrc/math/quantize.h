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

// What values are multiplied by, or their roots: 127 / scale or 255 / sqrt(scale), but finite where
// the scale is not 0, and 0 where it is.
EFFKERN_INLINE float codes_per_scale(float scale) {
  if (scale == 0.0f) return 0.0f;
  const float factor = 127.0f / scale;
  return factor > 3.402823466e38f ? 3.402823466e38f : factor;
}
EFFKERN_INLINE float codes_per_root(float scale) {
  return scale == 0.0f ? 0.0f : 255.0f / square_root(scale);
}

// The code as a floating-point number that remains to be rounded to the nearest, ties to even.
template <class V, class S>
EFFKERN_INLINE V signed_code(V value, S per_scale) {
  return value * per_scale;
}
template <class V, class S>
EFFKERN_INLINE V signed_value(V code, S scale) {
  return code * (scale * (S(1) / S(127)));
}

// Likewise of the value's square root, and then raised to 1 where that is not 0.
template <class V, class S>
EFFKERN_INLINE V unsigned_code(V root, S per_root) {
  return root * per_root;
}
template <class V, class S>
EFFKERN_INLINE V unsigned_value(V code, S scale) {
  return code * code * (scale * (S(1) / S(65025)));
}

}  // namespace effkern
