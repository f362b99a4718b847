// Adadelta (Zeiler, 2012), with the conventions of torch.optim.Adadelta.
#pragma once

#include "math/rule.h"

namespace effkern {

struct Adadelta {
  double rho, eps, weight_decay;
  bool maximize;

  static constexpr const char* kName = "adadelta";
  static constexpr const char* kStates[] = {"square_avgs", "acc_deltas"};
  static constexpr bool kCountsSteps = false;
  template <class Field>
  EFFKERN_MEMBER void each_field(Field&& field) {
    field(rho), field(eps), field(weight_decay), field(maximize);
  }

  static constexpr int kVariants = 1;
  EFFKERN_MEMBER int variant() const { return 0; }
  static constexpr bool has_state(int, int state) { return state < 2; }

  // Whether a state's values may be negative.
  static constexpr bool is_signed(int) { return false; }

  template <class S>
  struct Scalars {
    S lr, rho, one_minus_rho, eps, l2, sign;
  };

  template <class S>
  EFFKERN_MEMBER Scalars<S> scalars(double lr, double) const {
    Scalars<S> s;
    s.lr = static_cast<S>(lr);
    s.rho = static_cast<S>(rho);
    s.one_minus_rho = static_cast<S>(1.0 - rho);
    s.eps = static_cast<S>(eps);
    s.l2 = static_cast<S>(weight_decay);
    s.sign = static_cast<S>(maximize ? -1.0 : 1.0);
    return s;
  }

  template <int kVariant, class V, class S>
  EFFKERN_INLINE void update(V& param, V grad, V (&state)[kMostStates], const Scalars<S>& s) {
    grad = signed_and_decayed(grad, param, s.sign, s.l2);
    V &square_avg = state[0], &acc_delta = state[1];
    square_avg = square_avg * s.rho + grad * s.one_minus_rho * grad;
    const V delta = square_root(acc_delta + s.eps) / square_root(square_avg + s.eps) * grad;
    acc_delta = acc_delta * s.rho + delta * s.one_minus_rho * delta;
    param = param - delta * s.lr;
  }
};

}  // namespace effkern
