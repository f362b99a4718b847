#include "cpu/kernels/isa.h"

namespace effkern::cpu::EFFKERN_ISA {

Kernels kernels() {
  return {EFFKERN_NAME_OF(EFFKERN_ISA),
          rms_norm_forward,
          rms_norm_backward,
          rms_norm_weight,
          adam,
          bandwidth};
}

}  // namespace effkern::cpu::EFFKERN_ISA
