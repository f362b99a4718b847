// RMSprop (Tieleman and Hinton, 2012), centred (Graves, 2013) and with momentum, with the
// conventions of torch.optim.RMSprop. The centred variance is kept from falling below 0, where
// rounding can bring it.
#pragma once

#include "math/rule.h"

namespace effkern {

struct RmsProp {
  double alpha, eps, weight_decay, momentum;
  bool centered, maximize;

  static constexpr const char* kName = "rmsprop";
  static constexpr const char* kStates[] = {"square_avgs", "momentum_buffers", "grad_avgs"};
  static constexpr bool kCountsSteps = false;
  template <class Field>
  EFFKERN_MEMBER void each_field(Field&& field) {
    field(alpha), field(eps), field(weight_decay), field(momentum);
    field(centered), field(maximize);
  }

  static constexpr int kVariants = 4;  // + 1 with momentum, + 2 centred
  EFFKERN_MEMBER int variant() const { return (momentum != 0.0) + 2 * centered; }
  static constexpr bool has_state(int variant, int state) {
    return state == 0 || (state == 1 && (variant & 1)) || (state == 2 && (variant & 2));
  }

  // Whether a state's values may be negative.
  static constexpr bool is_signed(int state) { return state != 0; }

  template <class S>
  struct Scalars {
    S lr, alpha, one_minus_alpha, eps, momentum, l2, sign;
  };

  template <class S>
  EFFKERN_MEMBER Scalars<S> scalars(double lr, double) const {
    Scalars<S> s;
    s.lr = static_cast<S>(lr);
    s.alpha = static_cast<S>(alpha);
    s.one_minus_alpha = static_cast<S>(1.0 - alpha);
    s.eps = static_cast<S>(eps);
    s.momentum = static_cast<S>(momentum);
    s.l2 = static_cast<S>(weight_decay);
    s.sign = static_cast<S>(maximize ? -1.0 : 1.0);
    return s;
  }

  template <int kVariant, class V, class S>
  EFFKERN_INLINE void update(V& param, V grad, V (&state)[kMostStates], const Scalars<S>& s) {
    auto& [square_avg, buffer, grad_avg] = state;
    grad = signed_and_decayed(grad, param, s.sign, s.l2);
    square_avg = square_avg * s.alpha + grad * s.one_minus_alpha * grad;
    V second = square_avg;
    if constexpr ((kVariant & 2) != 0) {
      grad_avg = grad_avg + (grad - grad_avg) * s.one_minus_alpha;
      second = larger(square_avg - grad_avg * grad_avg, V{});
    }
    V step = grad / (square_root(second) + s.eps);
    if constexpr ((kVariant & 1) != 0) step = buffer = buffer * s.momentum + step;
    param = param - step * s.lr;
  }
};

}  // namespace effkern
