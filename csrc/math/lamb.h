// LAMB (You et al., 2020, Algorithm 2), with bias-corrected moments. The trust ratio is
// |param| / |direction|, and 1 where either is 0.
#pragma once

#include "math/rule.h"

namespace effkern {

struct Lamb {
  double beta1, beta2, eps, weight_decay;
  bool maximize;

  static constexpr const char* kName = "lamb";
  static constexpr const char* kStates[] = {"exp_avgs", "exp_avg_sqs"};
  static constexpr bool kCountsSteps = true;
  template <class Field>
  EFFKERN_MEMBER void each_field(Field&& field) {
    field(beta1), field(beta2), field(eps), field(weight_decay), field(maximize);
  }

  static constexpr int kVariants = 1;
  EFFKERN_MEMBER int variant() const { return 0; }
  static constexpr bool has_state(int, int state) { return state < 2; }

  // Whether a state's values may be negative.
  static constexpr bool is_signed(int state) { return state == 0; }

  template <class S>
  struct Scalars {
    S lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, sign;
    S rbias1;       // 1 / (1 - beta1^t)
    S rsqrt_bias2;  // 1 / sqrt(1 - beta2^t)
  };

  template <class S>
  EFFKERN_MEMBER Scalars<S> scalars(double lr, double t) const {
    Scalars<S> s;
    s.lr = static_cast<S>(lr);
    s.beta1 = static_cast<S>(beta1);
    s.one_minus_beta1 = static_cast<S>(1.0 - beta1);
    s.beta2 = static_cast<S>(beta2);
    s.one_minus_beta2 = static_cast<S>(1.0 - beta2);
    s.eps = static_cast<S>(eps);
    s.weight_decay = static_cast<S>(weight_decay);
    s.sign = static_cast<S>(maximize ? -1.0 : 1.0);
    s.rbias1 = static_cast<S>(1.0 / one_minus_power(beta1, t));
    s.rsqrt_bias2 = static_cast<S>(1.0 / ::sqrt(one_minus_power(beta2, t)));
    return s;
  }

  // First pass: the states move on.
  template <class V, class S>
  EFFKERN_INLINE void advance(V grad, V (&state)[kMostStates], const Scalars<S>& s) {
    grad = grad * s.sign;
    V &exp_avg = state[0], &exp_avg_sq = state[1];
    exp_avg = exp_avg * s.beta1 + grad * s.one_minus_beta1;
    exp_avg_sq = exp_avg_sq * s.beta2 + grad * s.one_minus_beta2 * grad;
  }

  // Both passes: where the parameter goes.
  template <class V, class S>
  EFFKERN_INLINE V direction(V param, const V (&state)[kMostStates], const Scalars<S>& s) {
    V r = state[0] * s.rbias1 / (square_root(state[1]) * s.rsqrt_bias2 + s.eps);
    if (s.weight_decay != S(0)) r = r + param * s.weight_decay;
    return r;
  }
};

// From the sums of squares of all elements.
EFFKERN_INLINE double trust_ratio(double param_squares, double direction_squares) {
  return param_squares == 0.0 || direction_squares == 0.0
             ? 1.0
             : ::sqrt(param_squares) / ::sqrt(direction_squares);
}

}  // namespace effkern
