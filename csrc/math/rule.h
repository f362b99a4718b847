// What an update rule is: a struct of its options, in double, with
//
//   kName, kStates          its name, and what its ops call the lists of state tensors
//   kCountsSteps            whether the formula knows the number of the step
//   each_field(f)           f(option) for each option, in the order of the ops' arguments
//   kVariants, variant()    which of the compiled forms the options ask for
//   has_state(variant, i)   whether that form reads and writes state i
//   is_signed(i)            whether values of state i may be negative
//   Scalars<S>              what one tensor needs at one step, in the accumulation type S; its
//                           `sign` is what gradients are multiplied by before all else
//   scalars<S>(lr, t)       the same for step t, counted from 1
//   update<variant>(...)    the formula
//
// for one element or one vector of elements at a time: V is S or a vector of S. math/scalar.h and
// cpu/simd.h (included first) give the functions below for both.
//
// A rule whose step is scaled by norms of the whole tensor takes two passes and has, instead of
// update, advance(...) for its states and direction(...) for where the parameter goes (lamb.h).
#pragma once

#include <cmath>

#include "common/macros.h"
#include "common/multi_tensor.h"
#include "math/scalar.h"

namespace effkern {

// 1 - beta^t, exact where beta^t is close to 1.
EFFKERN_INLINE double one_minus_power(double beta, double t) { return -::expm1(t * ::log(beta)); }

// The gradient to descend, with L2 decay. A decay of 0 is not multiplied: the parameter may be
// infinite.
template <class V, class S>
EFFKERN_INLINE V signed_and_decayed(V grad, V param, S sign, S l2) {
  grad = grad * sign;
  if (l2 != S(0)) grad = grad + param * l2;
  return grad;
}

}  // namespace effkern
