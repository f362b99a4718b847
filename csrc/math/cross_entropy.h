// The cross-entropy of a row of normalised logits z = (x - mean) / divisor (math/norm_softmax.h)
// against coefficients a of the classes, as torch.nn.functional.cross_entropy has them:
//
//   class index t          a = (1 - s) w_t at t, + s w_c / C at every class c
//   probabilities q        a = ((1 - s) q_c + s / C) w_c
//
// with weights w and label smoothing s. With A = sum(a), p the softmax and d = x less the largest
// x:
//
//   loss     = A log(sum(exp(d / divisor))) - sum(a d) / divisor
//   dz       = A p - a
//   sum(dz c) = A sum(p d) - sum(a d), c = x - mean, for sum(dz) = 0
//
// and from these the gradients of math/norm_softmax.h.
#pragma once

#include "math/norm_softmax.h"

namespace effkern {

// Sums over a row.
template <class S>
struct CrossEntropySums {
  S e, ed;  // of e = exp(d / divisor), and of e d
  S a, ad;  // of coefficients a, and of a d
};

template <class S>
EFFKERN_INLINE S cross_entropy(CrossEntropySums<S> sums, S inverse) {
  return sums.a * logarithm(sums.e) - sums.ad * inverse;
}

// sum(dz c).
template <class S>
EFFKERN_INLINE S cross_entropy_along(CrossEntropySums<S> sums) {
  return sums.a * (sums.ed / sums.e) - sums.ad;
}

// dz, with factor = A / sum(e).
template <class V, class S>
EFFKERN_INLINE V cross_entropy_grad_logit(V e, V a, S factor) {
  return e * factor - a;
}

}  // namespace effkern
