// CRMSNorm (Jiang et al., 2023, section 3.3): the RMSNorm of d numbers with sum zero, of which the
// last, -s with s = sum(x), is not stored. Of the d - 1 features that are:
//   xhat = x * rstd, rstd = 1 / sqrt((sum(x^2) + s^2) / d + eps)
//   grad_x = (g - (x + s) * rstd * sum(g * xhat) / d) * rstd
#pragma once

#include "math/norm.h"

namespace effkern {

struct CrmsNorm {
  static constexpr int kNumbers = 2, kForwardSums = 2, kBackwardSums = 1;
  static constexpr bool kHasOrigin = false;

  template <class V, class S>
  EFFKERN_INLINE void add_forward(NormSums<V>& sums, V x, S /*origin*/) {
    sums.first += x * x;
    sums.second += x;
  }
  template <class S>
  EFFKERN_INLINE NormRow<S> kept(NormSums<S> sums, S /*origin*/, int64_t features, S eps) {
    const S squares = sums.first + sums.second * sums.second;
    return {sums.second, S(1) / square_root(squares / static_cast<S>(features + 1) + eps)};
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
    return {sums.first / static_cast<S>(features + 1) * row.rstd, S(0)};
  }
  template <class V, class S>
  EFFKERN_INLINE V grad_x(V g, V x, NormRow<S> row, NormProjection<S> projection) {
    return (g - (x + row.first) * row.rstd * projection.on_xhat) * row.rstd;
  }
};

}  // namespace effkern
