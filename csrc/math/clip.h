// Clipping by the norm of all gradients together, as torch.nn.utils.clip_grad_norm_ does it.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace effkern {

// What every gradient is multiplied by. `squares`: the sum of squares of all of them as they are,
// that is, multiplied by `scale`. NaN stays NaN.
EFFKERN_INLINE double clipping_factor(double squares, double scale, double max_norm) {
  const double ratio = max_norm / (::sqrt(squares) / scale + 1e-6);
  return (ratio >= 1.0 ? 1.0 : ratio) / scale;
}

}  // namespace effkern
