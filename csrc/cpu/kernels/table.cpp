#include "cpu/kernels/isa.h"

namespace effkern::cpu::EFFKERN_ISA {

Kernels kernels() {
  Kernels all;
  all.isa = EFFKERN_NAME_OF(EFFKERN_ISA);
  all.norms[static_cast<int>(Norm::kRms)] = rms_norm();
  all.norms[static_cast<int>(Norm::kCrms)] = crms_norm();
  all.norms[static_cast<int>(Norm::kLayer)] = layer_norm();
  all.norm_softmax = norm_softmax();
  all.norm_softmax_cross_entropy = norm_softmax_cross_entropy;
  all.norm_attention = {norm_attention_forward, norm_attention_backward};
  all.attention_by_scores = {attention_by_scores_forward, attention_by_scores_backward};
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
