// Adagrad (Duchi et al., 2011), with the conventions of torch.optim.Adagrad.
#pragma once

#include "math/rule.h"

namespace effkern {

struct Adagrad {
  double lr_decay, eps, weight_decay;
  bool maximize;

  static constexpr const char* kName = "adagrad";
  static constexpr const char* kStates[] = {"sums"};
  static constexpr bool kCountsSteps = true;
  template <class Field>
  EFFKERN_MEMBER void each_field(Field&& field) {
    field(lr_decay), field(eps), field(weight_decay), field(maximize);
  }

  static constexpr int kVariants = 1;
  EFFKERN_MEMBER int variant() const { return 0; }
  static constexpr bool has_state(int, int state) { return state < 1; }

  // Whether a state's values may be negative.
  static constexpr bool is_signed(int) { return false; }

  template <class S>
  struct Scalars {
    S step_size;  // lr / (1 + (t - 1) * lr_decay)
    S eps, l2, sign;
  };

  template <class S>
  EFFKERN_MEMBER Scalars<S> scalars(double lr, double t) const {
    Scalars<S> s;
    s.step_size = static_cast<S>(lr / (1.0 + (t - 1.0) * lr_decay));
    s.eps = static_cast<S>(eps);
    s.l2 = static_cast<S>(weight_decay);
    s.sign = static_cast<S>(maximize ? -1.0 : 1.0);
    return s;
  }

  template <int kVariant, class V, class S>
  EFFKERN_INLINE void update(V& param, V grad, V (&state)[kMostStates], const Scalars<S>& s) {
    grad = signed_and_decayed(grad, param, s.sign, s.l2);
    V& sum = state[0];
    sum = sum + grad * grad;
    param = param - grad * s.step_size / (square_root(sum) + s.eps);
  }
};

}  // namespace effkern
