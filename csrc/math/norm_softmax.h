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

// The sums that a row's gradient needs, with e = p up to a factor.
template <class V>
struct SoftmaxSums {
  V e, eg, ec, egc;

  EFFKERN_MEMBER void add(V exponential, V g, V c) {
    const V of_g = exponential * g;
    e += exponential;
    eg += of_g;
    ec += exponential * c;
    egc += of_g * c;
  }
};

template <class S>
struct SoftmaxGradient {
  S factor;    // p = e * factor
  S mean_g;    // sum(p g)
  S inverse;   // of the divisor
  S on_c;      // sum(dz c) / sum(c^2), or 0
  S grad_tau;  // the row's share
};

template <class S>
EFFKERN_INLINE SoftmaxGradient<S> softmax_gradient(SoftmaxSums<S> sums, S squares,
                                                   SoftmaxDivisor<S> divisor, S tau) {
  const S factor = S(1) / sums.e;
  const S mean_g = sums.eg * factor;
  const S along = (sums.egc - mean_g * sums.ec) * factor;
  return {factor, mean_g, S(1) / divisor.value, divisor.is_sigma ? along / squares : S(0),
          divisor.is_tau ? -along / (tau * tau) : S(0)};
}

template <class V, class S>
EFFKERN_INLINE V softmax_grad_x(V e, V g, V c, SoftmaxGradient<S> row) {
  return (e * row.factor * (g - row.mean_g) - c * row.on_c) * row.inverse;
}

}  // namespace effkern
