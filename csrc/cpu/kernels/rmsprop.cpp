// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/mixed.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {

void rmsprop(const StepTask& task, const RmsProp& rule, int64_t begin, int64_t end) {
  any_step(task, rule, begin, end);
}

}  // namespace effkern::cpu::EFFKERN_ISA
