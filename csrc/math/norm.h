// What the formula of a norm of rows consists of; rms_norm.h, crms_norm.h and layer_norm.h each
// have one. S is the accumulation type, V is S or a vector of it.
//
//   kNumbers        how many numbers of a row are kept for its backward pass: rstd, or another
//                   (mean or sum) before it
//   kHasOrigin      the forward pass takes its sums about an origin, a number near the row's mean:
//                   the mean of its first kOriginFeatures features or more
//   kHasBias        there may be a bias
//   kForwardSums    how many sums over a row the forward pass takes, and the backward pass
//   kBackwardSums
//   add_forward     adds an element of a row, or a vector of them, to the forward sums
//   kept            the row's numbers, from its sums
//   normalised      xhat of an element
//   add_backward    adds an element to the backward sums; g is weight * grad
//   projection      what grad_x needs of the sums
//   grad_x          the gradient of an element
#pragma once

#include "common/macros.h"
#include "math/scalar.h"

namespace effkern {

// With the mean of so many features for its origin, a row of n has a sum of squares at most
// 1 + n / 1,024 times the one about its mean, whatever the values are: that much of the precision
// is lost at most, and next to nothing where the first features are like the others.
constexpr int64_t kOriginFeatures = 1024;

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

}  // namespace effkern
