// Adam (Kingma and Ba, 2015), AdamW (Loshchilov and Hutter, 2019) and AMSGrad (Reddi et al., 2018),
// with the conventions of torch.optim.Adam.
#pragma once

#include "math/rule.h"

namespace effkern {

struct Adam {
  double beta1, beta2, eps, weight_decay;
  bool decoupled;  // AdamW: decay the parameter, not the gradient
  bool amsgrad, maximize;
  bool bias_correction;  // false: as Apex has it, the running means are used as they are

  static constexpr const char* kName = "adam";
  static constexpr const char* kStates[] = {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
  static constexpr bool kCountsSteps = true;
  template <class Field>
  EFFKERN_MEMBER void each_field(Field&& field) {
    field(beta1), field(beta2), field(eps), field(weight_decay);
    field(decoupled), field(amsgrad), field(maximize), field(bias_correction);
  }

  static constexpr int kVariants = 2;
  EFFKERN_MEMBER int variant() const { return amsgrad; }
  static constexpr bool has_state(int variant, int state) { return state < 2 + variant; }

  // Whether a state's values may be negative.
  static constexpr bool is_signed(int state) { return state == 0; }

  template <class S>
  struct Scalars {
    S one_minus_beta1, beta2, one_minus_beta2, eps;
    S step_size;    // lr / (1 - beta1^t); lr without bias correction
    S rsqrt_bias2;  // 1 / sqrt(1 - beta2^t); 1 without
    S shrink;       // AdamW: 1 - lr * weight_decay; 1 otherwise
    S l2;           // Adam: weight_decay; 0 otherwise
    S sign;         // -1 to maximize, else 1
  };

  template <class S>
  EFFKERN_MEMBER Scalars<S> scalars(double lr, double t) const {
    Scalars<S> s;
    s.one_minus_beta1 = static_cast<S>(1.0 - beta1);
    s.beta2 = static_cast<S>(beta2);
    s.one_minus_beta2 = static_cast<S>(1.0 - beta2);
    s.eps = static_cast<S>(eps);
    const double bias1 = bias_correction ? one_minus_power(beta1, t) : 1.0;
    const double bias2 = bias_correction ? one_minus_power(beta2, t) : 1.0;
    s.step_size = static_cast<S>(lr / bias1);
    s.rsqrt_bias2 = static_cast<S>(1.0 / ::sqrt(bias2));
    s.shrink = static_cast<S>(decoupled ? 1.0 - lr * weight_decay : 1.0);
    s.l2 = static_cast<S>(decoupled ? 0.0 : weight_decay);
    s.sign = static_cast<S>(maximize ? -1.0 : 1.0);
    return s;
  }

  template <int kVariant, class V, class S>
  EFFKERN_INLINE void update(V& param, V grad, V (&state)[kMostStates], const Scalars<S>& s) {
    auto& [exp_avg, exp_avg_sq, max_exp_avg_sq] = state;
    grad = signed_and_decayed(grad, param, s.sign, s.l2);
    param = param * s.shrink;
    exp_avg = exp_avg + (grad - exp_avg) * s.one_minus_beta1;
    exp_avg_sq = exp_avg_sq * s.beta2 + grad * s.one_minus_beta2 * grad;
    V second = exp_avg_sq;
    if constexpr (kVariant == 1) second = max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq);
    param = param - exp_avg * s.step_size / (square_root(second) * s.rsqrt_bias2 + s.eps);
  }
};

}  // namespace effkern
