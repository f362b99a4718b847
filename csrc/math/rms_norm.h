// RMSNorm (Zhang and Sennrich, 2019): xhat = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps);
// grad_x = (g - xhat * mean(g * xhat)) * rstd.
#pragma once

#include "math/norm.h"

namespace effkern {

struct RmsNorm {
  static constexpr int kNumbers = 1, kForwardSums = 1, kBackwardSums = 1;
  static constexpr bool kHasOrigin = false;

  template <class V, class S>
  EFFKERN_INLINE void add_forward(NormSums<V>& sums, V x, S /*origin*/) {
    sums.first += x * x;
  }
  template <class S>
  EFFKERN_INLINE NormRow<S> kept(NormSums<S> sums, S /*origin*/, int64_t features, S eps) {
    return {S(0), S(1) / square_root(sums.first / static_cast<S>(features) + eps)};
  }
  template <class V, class S>
  EFFKERN_INLINE V normalised(V x, NormRow<S> row) {
    return x * row.rstd;
  }
  template <class V, class S>
  EFFKERN_INLINE V restored(V xhat, NormRow<S> row) {
    return xhat / row.rstd;
  }
  template <class V, class S>
  EFFKERN_INLINE void add_backward(NormSums<V>& sums, V g, V x, NormRow<S> /*row*/) {
    sums.first += g * x;
  }
  template <class S>
  EFFKERN_INLINE NormProjection<S> projection(NormSums<S> sums, NormRow<S> row, int64_t features) {
    return {sums.first / static_cast<S>(features) * row.rstd, S(0)};
  }
  template <class V, class S>
  EFFKERN_INLINE V grad_x(V g, V x, NormRow<S> row, NormProjection<S> projection) {
    return (g - x * row.rstd * projection.on_xhat) * row.rstd;
  }
};

}  // namespace effkern
