// Included first by every kernel source: the build compiles each of them once per instruction set,
// with EFFKERN_ISA naming the namespace of that copy.
#pragma once

#ifndef EFFKERN_ISA
#error "EFFKERN_ISA must name the namespace of this copy: baseline, avx2 or avx512"
#endif
#define EFFKERN_STRING_OF(x) #x
#define EFFKERN_NAME_OF(x) EFFKERN_STRING_OF(x)

// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/simd.h"
#include "cpu/kernels.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {

NormKernels rms_norm();
NormKernels crms_norm();
NormKernels layer_norm();
NormSoftmaxKernels norm_softmax();
void norm_softmax_cross_entropy(const NormSoftmaxCrossEntropyTask&, int64_t begin, int64_t end);
void norm_attention_forward(const NormAttentionForward&, int64_t begin, int64_t end);
void norm_attention_backward(const NormAttentionBackward&, int64_t begin, int64_t end);
void attention_by_scores_forward(const AttentionByScoresForward&, int64_t begin, int64_t end);
void attention_by_scores_backward(const AttentionByScoresBackward&, int64_t begin, int64_t end);
#define EFFKERN_DECLARE(Rule, name) \
  void name(const StepTask&, const Rule&, int64_t begin, int64_t end);
EFFKERN_ONE_PASS_RULES(EFFKERN_DECLARE)
#undef EFFKERN_DECLARE
void squares(const StepTask&, double* squares, int64_t begin, int64_t end);
void lamb_advance(const StepTask&, const Lamb&, double* squares, int64_t begin, int64_t end);
void lamb_apply(const StepTask&, const Lamb&, const double* ratios, int64_t begin, int64_t end);
void bandwidth(const BandwidthTask&, int64_t begin, int64_t end);

}  // namespace effkern::cpu::EFFKERN_ISA
