// Included first by every kernel source: the build compiles each of them once per instruction set,
// with EFFKERN_ISA naming the namespace of that copy.
#pragma once

#ifndef EFFKERN_ISA
#error "EFFKERN_ISA must name the namespace of this copy: baseline, avx2 or avx512"
#endif
#define EFFKERN_STRING_OF(x) #x
#define EFFKERN_NAME_OF(x) EFFKERN_STRING_OF(x)

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace effkern::cpu::EFFKERN_ISA {

void rms_norm_forward(const RmsNormForward&, int64_t begin, int64_t end);
void rms_norm_backward(const RmsNormBackward&, int64_t chunk_rows, void* partial, int64_t begin,
                       int64_t end);
void rms_norm_weight(const RmsNormBackward&, int64_t chunks, const void* partial, int64_t begin,
                     int64_t end);
void adam(const AdamTask&, int64_t begin, int64_t end);
void bandwidth(const BandwidthTask&, int64_t begin, int64_t end);

}  // namespace effkern::cpu::EFFKERN_ISA
