// What a user chooses of Adam and AdamW, in double. Formulas: math/adam.h.
#pragma once

namespace effkern {

struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // AdamW: decay the parameter, not the gradient
  bool amsgrad, maximize;
};

}  // namespace effkern
