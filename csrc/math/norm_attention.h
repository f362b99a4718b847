// NormSoftmax attention without its scores: the deviation of row i over the keys it sees is
//
//   sigma_i = |scale| sqrt(q_i^T M_i q_i / n_i),    M_i = sum (k_j - mu_i)(k_j - mu_i)^T
//
// over its n_i keys, mu_i their mean; the row's query is divided by max(min(sigma_i, tau), eps).
// Two sets of keys are put together (Chan, Golub and LeVeque 1983) by
//
//   M = M_a + M_b + (n_a n_b / n) (mu_b - mu_a)(mu_b - mu_a)^T,
//
// a sum of terms that are never negative, so that nothing cancels. In causal attention a is what
// came before a chunk of keys, and b the keys of the chunk up to the row's own; with
// s_j = q_i . (k_j - mu_a) and m their sum over n,
//
//   q_i^T M_i q_i = q_i^T M_a q_i + n_a m^2 + sum_b (s_j - m)^2.
//
// With w_i = 2 scale^2 h_i / n_i, h_i the gradient of sigma_i^2, and c_ij = q_i . (k_j - mu_i):
//
//   grad q_i = w_i (M_a q_i + sum_b c_ij (k_j - mu_a)),    grad k_j = sum_i w_i c_ij q_i.
#pragma once

#include "common/macros.h"
#include "math/scalar.h"

namespace effkern {

// max(min(sigma, tau), eps); a NaN stays one.
template <class S>
EFFKERN_INLINE S attention_divisor(S sigma, S tau, S eps) {
  const S low = sigma >= tau ? tau : sigma;
  return low < eps ? eps : low;
}

// The gradient of a row's sigma^2 from that of its divisor: nothing unless sigma is the divisor.
template <class S>
EFFKERN_INLINE S through_sigma(S of_divisor, S sigma, S tau, S eps) {
  const bool is_sigma = sigma >= eps && sigma < tau && sigma > 0;
  return is_sigma ? of_divisor / (2 * sigma) : S(0);
}

// What joins n_b keys to n_a: the weight of the outer product of the means' difference.
EFFKERN_INLINE double joining_weight(double n_a, double n_b) { return n_a * n_b / (n_a + n_b); }

}  // namespace effkern
