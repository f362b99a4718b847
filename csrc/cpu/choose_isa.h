#pragma once

#include "cpu/kernels.h"

namespace effkern::cpu {

// The kernels of the instruction set in use.
const Kernels& chosen_kernels();

}  // namespace effkern::cpu
