// LayerNorm (Ba, Kiros and Hinton, 2016): xhat = (x - mean) * rstd, rstd = 1 / sqrt(var + eps),
// var the population variance; grad_x = (g - mean(g) - xhat * mean(g * xhat)) * rstd.
#pragma once

#include "math/norm.h"

namespace effkern {

struct LayerNorm {
  static constexpr int kNumbers = 2, kForwardSums = 2, kBackwardSums = 2;
  static constexpr bool kHasOrigin = true;

  template <class V, class S>
  EFFKERN_INLINE void add_forward(NormSums<V>& sums, V x, S origin) {
    const V deviation = x - origin;
    sums.first += deviation * deviation;
    sums.second += deviation;
  }
  template <class S>
  EFFKERN_INLINE S mean(NormSums<S> sums, S origin, int64_t features) {
    return origin + sums.second / static_cast<S>(features);
  }
  template <class S>
  EFFKERN_INLINE S variance(NormSums<S> sums, int64_t features) {
    const S shift = sums.second / static_cast<S>(features);
    return sums.first / static_cast<S>(features) - shift * shift;
  }
  // Whether that difference cancels more than half of what it is taken of.
  template <class S>
  EFFKERN_INLINE bool is_far(NormSums<S> sums, int64_t features) {
    return sums.first / static_cast<S>(features) > 2 * variance(sums, features);
  }
  template <class S>
  EFFKERN_INLINE NormRow<S> kept(NormSums<S> sums, S origin, int64_t features, S eps) {
    // Where all features are alike, rounding may leave the variance below zero.
    const S positive = larger(variance(sums, features), S(0));
    return {mean(sums, origin, features), S(1) / square_root(positive + eps)};
  }
  template <class V, class S>
  EFFKERN_INLINE V normalised(V x, NormRow<S> row) {
    return (x - row.first) * row.rstd;
  }
  template <class V, class S>
  EFFKERN_INLINE V restored(V xhat, NormRow<S> row) {
    return row.first + xhat / row.rstd;
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
