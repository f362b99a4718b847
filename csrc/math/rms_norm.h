// RMSNorm (Zhang and Sennrich, 2019): y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps).
// S is the accumulation type, V is S or a vector of it.
#pragma once

#include "common/macros.h"
#include "math/scalar.h"

namespace effkern {

template <class S>
EFFKERN_INLINE S rms_norm_rstd(S sum_of_squares, int64_t features, S eps) {
  return S(1) / square_root(sum_of_squares / static_cast<S>(features) + eps);
}

// With g = weight * grad and xhat = x * rstd:  dx = (g - xhat * mean(g * xhat)) * rstd.
// `projection` is mean(g * xhat), one number a row.
template <class S>
EFFKERN_INLINE S rms_norm_projection(S sum_of_gx, S rstd, int64_t features) {
  return sum_of_gx / static_cast<S>(features) * rstd;
}

template <class V, class S>
EFFKERN_INLINE V rms_norm_grad_x(V g, V x, S rstd, S projection) {
  return (g - x * rstd * projection) * rstd;
}

// One row's share of the weight's gradient.
template <class V, class S>
EFFKERN_INLINE V rms_norm_grad_weight(V grad, V x, S rstd) {
  return grad * (x * rstd);
}

}  // namespace effkern
