// Adam (Kingma and Ba, 2015), AdamW (Loshchilov and Hutter, 2019) and AMSGrad (Reddi et al., 2018),
// with the conventions of torch.optim.Adam. One element, or one vector of elements, at a time.
#pragma once

#include <cmath>

#include "common/adam.h"
#include "common/macros.h"
#include "math/scalar.h"

namespace effkern {

// What one tensor needs at one step, in the accumulation type S.
template <class S>
struct AdamScalars {
  S one_minus_beta1, beta2, one_minus_beta2, eps;
  S step_size;    // lr / (1 - beta1^t)
  S rsqrt_bias2;  // 1 / sqrt(1 - beta2^t)
  S shrink;       // AdamW: 1 - lr * weight_decay; 1 otherwise
  S l2;           // Adam: weight_decay; 0 otherwise
  S sign;         // -1 to maximize, else 1
};

// t counts from 1. 1 - beta^t is -expm1(t log(beta)): exact where beta^t is close to 1.
template <class S>
EFFKERN_INLINE AdamScalars<S> adam_scalars(const AdamOptions& o, double t) {
  const double bias1 = -::expm1(t * ::log(o.beta1));
  const double bias2 = -::expm1(t * ::log(o.beta2));
  AdamScalars<S> s;
  s.one_minus_beta1 = static_cast<S>(1.0 - o.beta1);
  s.beta2 = static_cast<S>(o.beta2);
  s.one_minus_beta2 = static_cast<S>(1.0 - o.beta2);
  s.eps = static_cast<S>(o.eps);
  s.step_size = static_cast<S>(o.lr / bias1);
  s.rsqrt_bias2 = static_cast<S>(1.0 / ::sqrt(bias2));
  s.shrink = static_cast<S>(o.decoupled ? 1.0 - o.lr * o.weight_decay : 1.0);
  s.l2 = static_cast<S>(o.decoupled ? 0.0 : o.weight_decay);
  s.sign = static_cast<S>(o.maximize ? -1.0 : 1.0);
  return s;
}

// V is S or a vector of S: math/scalar.h and cpu/simd.h (included first) give square_root and
// larger for both.
template <bool kAmsgrad, class V, class S>
EFFKERN_INLINE void adam_update(V& param, V grad, V& exp_avg, V& exp_avg_sq, V& max_exp_avg_sq,
                                const AdamScalars<S>& s) {
  grad = grad * s.sign;
  if (s.l2 != S(0)) grad = grad + param * s.l2;
  param = param * s.shrink;
  exp_avg = exp_avg + (grad - exp_avg) * s.one_minus_beta1;
  exp_avg_sq = exp_avg_sq * s.beta2 + grad * grad * s.one_minus_beta2;
  V second = exp_avg_sq;
  if constexpr (kAmsgrad) second = max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq);
  param = param - exp_avg * s.step_size / (square_root(second) * s.rsqrt_bias2 + s.eps);
}

}  // namespace effkern
