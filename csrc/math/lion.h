// Lion (Chen et al., 2023, Algorithm 2).
#pragma once

#include "math/rule.h"

namespace effkern {

struct Lion {
  double beta1, beta2, weight_decay;
  bool maximize;

  static constexpr const char* kName = "lion";
  static constexpr const char* kStates[] = {"exp_avgs"};
  static constexpr bool kCountsSteps = false;
  template <class Field>
  EFFKERN_MEMBER void each_field(Field&& field) {
    field(beta1), field(beta2), field(weight_decay), field(maximize);
  }

  static constexpr int kVariants = 1;
  EFFKERN_MEMBER int variant() const { return 0; }
  static constexpr bool has_state(int, int state) { return state < 1; }

  // Whether a state's values may be negative.
  static constexpr bool is_signed(int) { return true; }

  template <class S>
  struct Scalars {
    S lr, shrink, beta1, one_minus_beta1, beta2, one_minus_beta2, sign;
  };

  template <class S>
  EFFKERN_MEMBER Scalars<S> scalars(double lr, double) const {
    Scalars<S> s;
    s.lr = static_cast<S>(lr);
    s.shrink = static_cast<S>(1.0 - lr * weight_decay);
    s.beta1 = static_cast<S>(beta1);
    s.one_minus_beta1 = static_cast<S>(1.0 - beta1);
    s.beta2 = static_cast<S>(beta2);
    s.one_minus_beta2 = static_cast<S>(1.0 - beta2);
    s.sign = static_cast<S>(maximize ? -1.0 : 1.0);
    return s;
  }

  template <int kVariant, class V, class S>
  EFFKERN_INLINE void update(V& param, V grad, V (&state)[kMostStates], const Scalars<S>& s) {
    grad = grad * s.sign;
    V& exp_avg = state[0];
    const V toward = exp_avg * s.beta1 + grad * s.one_minus_beta1;
    exp_avg = exp_avg * s.beta2 + grad * s.one_minus_beta2;
    param = param * s.shrink - sign_of(toward) * s.lr;
  }
};

}  // namespace effkern
