// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/norm.h"
// clang-format on
#include "math/crms_norm.h"

namespace effkern::cpu::EFFKERN_ISA {

NormKernels crms_norm() { return norm_kernels<CrmsNorm>(); }

}  // namespace effkern::cpu::EFFKERN_ISA
