// LayerNorm (Ba, Kiros and Hinton, 2016): xhat = (x - mean) * rstd, rstd = 1 / sqrt(var + eps),
// var the population variance; grad_x = (g - mean(g) - xhat * mean(g * xhat)) * rstd.
#pragma once

#include "math/norm.h"

namespace effkern {

struct LayerNorm {
  static constexpr int kNumbers = 2, kForwardSums = 2, kBackwardSums = 2;
  static constexpr bool kHasOrigin = true, kHasBias = true;

  template <class V, class S>
  EFFKERN_INLINE void add_forward(NormSums<V>& sums, V x, S origin) {
    const V deviation = x - origin;
    sums.first += deviation * deviation;
    sums.second += deviation;
  }
  template <class S>
  EFFKERN_INLINE NormRow<S> kept(NormSums<S> sums, S origin, int64_t features, S eps) {
    const S shift = sums.second / static_cast<S>(features);
    const S variance = sums.first / static_cast<S>(features) - shift * shift;
    // Where all features are alike, rounding may leave it below zero.
    return {origin + shift, S(1) / square_root(larger(variance, S(0)) + eps)};
  }
  template <class V, class S>
  EFFKERN_INLINE V normalised(V x, NormRow<S> row) {
    return (x - row.first) * row.rstd;
  }
  template <class V, class S>
  EFFKERN_INLINE void add_backward(NormSums<V>& sums, V g, V x, NormRow<S> row) {
    sums.first += g * (x - row.first);
    sums.second += g;
  }
  template <class S>
  EFFKERN_INLINE NormProjection<S> projection(NormSums<S> sums, NormRow<S> row, int64_t features) {
    return {sums.first / static_cast<S>(features) * row.rstd,
            sums.second / static_cast<S>(features)};
  }
  template <class V, class S>
  EFFKERN_INLINE V grad_x(V g, V x, NormRow<S> row, NormProjection<S> projection) {
    return (g - projection.on_one - (x - row.first) * row.rstd * projection.on_xhat) * row.rstd;
  }
};

}  // namespace effkern
