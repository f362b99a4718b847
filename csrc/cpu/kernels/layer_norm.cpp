// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/norm.h"
// clang-format on
#include "math/layer_norm.h"

namespace effkern::cpu::EFFKERN_ISA {

NormKernels layer_norm() { return norm_kernels<LayerNorm>(); }

}  // namespace effkern::cpu::EFFKERN_ISA
