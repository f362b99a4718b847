// PyTorch's threads, in the form that the CPU kernels ask for.
#pragma once

#include "cpu/cpu.h"
#include "torch/arguments.h"

namespace effkern {

inline void torch_threads(int64_t total, int64_t grain, cpu::Body body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, total, grain, body, context));
}

}  // namespace effkern
