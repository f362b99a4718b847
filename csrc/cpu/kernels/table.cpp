#include "cpu/kernels/isa.h"

namespace effkern::cpu::EFFKERN_ISA {

Kernels kernels() {
  Kernels all;
  all.isa = EFFKERN_NAME_OF(EFFKERN_ISA);
  all.rms_norm_forward = rms_norm_forward;
  all.rms_norm_backward = rms_norm_backward;
  all.rms_norm_weight = rms_norm_weight;
#define EFFKERN_SET(Rule, name) all.name = name;
  EFFKERN_ONE_PASS_RULES(EFFKERN_SET)
#undef EFFKERN_SET
  all.squares = squares;
  all.lamb_advance = lamb_advance;
  all.lamb_apply = lamb_apply;
  all.bandwidth = bandwidth;
  return all;
}

}  // namespace effkern::cpu::EFFKERN_ISA
