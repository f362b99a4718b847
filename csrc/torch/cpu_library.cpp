// What effkern/backends/native.py calls of this library by ctypes, beside the ops.
#include "torch/cpu.h"

#define EFFKERN_EXPORT extern "C" __attribute__((visibility("default")))

EFFKERN_EXPORT const char* effkern_cpu_isa() { return effkern::cpu::isa(); }

EFFKERN_EXPORT bool effkern_set_cpu_isa(const char* name) { return effkern::cpu::set_isa(name); }

EFFKERN_EXPORT void effkern_cpu_bandwidth(const float* const* inputs, int64_t reads,
                                          float* const* outputs, int64_t writes, int64_t elements) {
  effkern::cpu::bandwidth({inputs, outputs, reads, writes}, elements, effkern::torch_threads);
}
