// What the formula of a norm of rows consists of; rms_norm.h, crms_norm.h and layer_norm.h each
// have one. S is the accumulation type, V is S or a vector of it.
//
//   kNumbers        how many numbers of a row are kept for its backward pass: rstd, or another
//                   (mean or sum) before it
//   kHasOrigin      the forward pass takes its sums about an origin, a number near the row's mean;
//                   `is_far` says from the sums whether it was not near enough, and `mean` where to
//                   take them anew
//   kForwardSums    how many sums over a row the forward pass takes, and the backward pass
//   kBackwardSums
//   add_forward     adds an element of a row, or a vector of them, to the forward sums
//   kept            the row's numbers, from its sums
//   normalised      xhat of an element
//   restored        the element of an xhat
//   add_backward    adds an element to the backward sums; g is weight * grad
//   projection      what grad_x needs of the sums
//   grad_x          the gradient of an element
#pragma once

#include "common/macros.h"
#include "math/scalar.h"

namespace effkern {

// A pass over memory takes the mean of a row's first features for its origin: so many at least, or
// all.
constexpr int64_t kOriginFeatures = 64;

// Sums over a row; a formula with one leaves `second` alone.
template <class V>
struct NormSums {
  V first, second;
};

// What is kept of a row.
template <class S>
struct NormRow {
  S first;  // where there are two numbers
  S rstd;
};

template <class S>
struct NormProjection {
  S on_xhat;  // times rstd
  S on_one;   // where the mean is taken off
};

// ---- xhat from y = xhat * weight + bias ----

// What a weight must at least be for that: beside the bias, and alone. Then at least half of the
// digits of y's storage type are left in xhat; common/norm.h has the numbers.
template <class S>
struct NormBounds {
  S beside_bias, alone;
};

// NaN where the weight is too small: a wrong gradient would not be noticed, and zero is one.
template <class V, class S>
EFFKERN_INLINE V xhat_of(V y, V weight, V bias, NormBounds<S> bounds) {
  const V magnitude = larger(weight, -weight), of_bias = larger(bias, -bias);
  const V xhat = (y - bias) / weight;
  return (magnitude >= of_bias * bounds.beside_bias) & (magnitude >= V{} + bounds.alone)
             ? xhat
             : V{} + S(__builtin_nanf(""));
}

}  // namespace effkern
