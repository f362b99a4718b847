// Stochastic gradient descent with momentum (Polyak, 1964) or Nesterov's (Sutskever et al., 2013),
// with the conventions of torch.optim.SGD: a new momentum buffer begins as the gradient,
// undampened.
#pragma once

#include "math/rule.h"

namespace effkern {

struct Sgd {
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;

  static constexpr const char* kName = "sgd";
  static constexpr const char* kStates[] = {"momentum_buffers"};
  static constexpr bool kCountsSteps = true;
  template <class Field>
  EFFKERN_MEMBER void each_field(Field&& field) {
    field(momentum), field(dampening), field(weight_decay);
    field(nesterov), field(maximize);
  }

  static constexpr int kVariants = 2;  // without momentum, with
  EFFKERN_MEMBER int variant() const { return momentum != 0.0; }
  static constexpr bool has_state(int variant, int state) { return state < variant; }

  // Whether a state's values may be negative.
  static constexpr bool is_signed(int) { return true; }

  template <class S>
  struct Scalars {
    S lr, l2, sign;
    S keep, take;      // of the buffer and of the gradient, into the buffer
    S ahead, through;  // of the buffer and of the gradient, into the step
  };

  template <class S>
  EFFKERN_MEMBER Scalars<S> scalars(double lr, double t) const {
    const bool first = t == 1.0;
    Scalars<S> s;
    s.lr = static_cast<S>(lr);
    s.l2 = static_cast<S>(weight_decay);
    s.sign = static_cast<S>(maximize ? -1.0 : 1.0);
    s.keep = static_cast<S>(first ? 0.0 : momentum);
    s.take = static_cast<S>(first ? 1.0 : 1.0 - dampening);
    s.ahead = static_cast<S>(nesterov ? momentum : 1.0);
    s.through = static_cast<S>(nesterov ? 1.0 : 0.0);
    return s;
  }

  template <int kVariant, class V, class S>
  EFFKERN_INLINE void update(V& param, V grad, V (&state)[kMostStates], const Scalars<S>& s) {
    grad = signed_and_decayed(grad, param, s.sign, s.l2);
    if constexpr (kVariant == 1) {
      V& buffer = state[0];
      buffer = buffer * s.keep + grad * s.take;
      // An infinite gradient times 0 is NaN.
      grad = s.through != S(0) ? grad + buffer * s.ahead : buffer;
    }
    param = param - grad * s.lr;
  }
};

}  // namespace effkern
