// NormSoftmax (Jiang et al., COINS 2023): y = softmax(x / max(min(sigma, tau), eps)), sigma the
// population's standard deviation of a row's visible entries; where there are fewer than two it
// counts as tau.
//
// With p = y, dz = p (g - sum(p g)) the gradient of the normalised logits and c = x - mean:
//
//   grad_x   = dz / divisor, less c sum(dz c) / (divisor sum(c^2)) where the divisor is sigma
//   grad_tau = -sum(dz c) / tau^2 where the divisor is tau; x in place of c is the same, for
//              sum(dz) = 0
//
// S is the accumulation type, V is S or a vector of it.
#pragma once

#include "common/macros.h"
#include "math/scalar.h"

namespace effkern {

// What a row is divided by, and what that is.
template <class S>
struct SoftmaxDivisor {
  S value;
  bool is_sigma, is_tau;
};

// Of the sum of squares of `count` deviations from their mean.
template <class S>
EFFKERN_INLINE SoftmaxDivisor<S> softmax_divisor(S squares, S count, S tau, S eps) {
  const S sigma = square_root(squares / count);
  if (count >= 2 && sigma < eps) return {eps, false, false};
  if (count < 2 || sigma >= tau) return {tau > eps ? tau : eps, false, tau > eps};
  return {sigma, true, false};
}

// A normalised logit, less that of a number at `origin`.
template <class V, class S>
EFFKERN_INLINE V normalised_logit(V x, S origin, S inverse) {
  return (x - origin) * inverse;
}

// What the gradient of a row's elements needs: their parts e of the distribution are p up to a
// factor.
template <class S>
struct SoftmaxGradient {
  S factor;   // p = e * factor
  S mean_g;   // sum(p g)
  S inverse;  // of the divisor
  S on_c;     // sum(dz c) / sum(c^2), or 0
};

template <class V, class S>
EFFKERN_INLINE V softmax_grad_logit(V e, V g, SoftmaxGradient<S> row) {
  return e * row.factor * (g - row.mean_g);
}
// From dz.
template <class V, class S>
EFFKERN_INLINE V softmax_grad_x(V dz, V c, SoftmaxGradient<S> row) {
  return (dz - c * row.on_c) * row.inverse;
}

// From `along`, which is sum(dz c).
template <class S>
EFFKERN_INLINE S softmax_on_c(S along, S squares, SoftmaxDivisor<S> divisor) {
  return divisor.is_sigma ? along / squares : S(0);
}
template <class S>
EFFKERN_INLINE S softmax_grad_tau(S along, S tau, SoftmaxDivisor<S> divisor) {
  return divisor.is_tau ? -along / (tau * tau) : S(0);
}

}  // namespace effkern
