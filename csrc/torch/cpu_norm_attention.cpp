// The kernel ops of NormSoftmax attention for CPU tensors.
#include "common/advise.h"
#include "torch/attention_by_scores.h"
#include "torch/cpu.h"
#include "torch/norm_attention.h"

namespace effkern {
namespace {

int64_t bytes_of_queries(const AttentionTask& task) {
  return task.batch * task.heads * task.rows * task.features * size_of(task.dtype);
}
int64_t bytes_of_keys(const AttentionTask& task) {
  return task.batch * task.key_heads * task.keys * task.features * size_of(task.dtype);
}

void forward(const NormAttentionForward& args, Device) {
  advise_huge_pages(args.scaled, bytes_of_queries(args));
  cpu::norm_attention_forward(args, torch_threads);
}

void backward(const NormAttentionBackward& args, Device) {
  advise_huge_pages(args.of_q, bytes_of_queries(args));
  advise_huge_pages(args.of_k, bytes_of_keys(args));
  cpu::norm_attention_backward(args, torch_threads);
}

void forward_by_scores(const AttentionByScoresForward& args, Device) {
  advise_huge_pages(
      args.y, args.batch * args.heads * args.rows * args.value_features * size_of(args.dtype));
  cpu::attention_by_scores_forward(args, torch_threads);
}

void backward_by_scores(const AttentionByScoresBackward& args, Device) {
  advise_huge_pages(args.of_q, bytes_of_queries(args));
  advise_huge_pages(args.of_k, bytes_of_keys(args));
  advise_huge_pages(args.of_v, args.batch * args.key_heads * args.keys * args.value_features *
                                   size_of(args.dtype));
  cpu::attention_by_scores_backward(args, torch_threads);
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  EFFKERN_REGISTER_NORM_ATTENTION(m, effkern::forward, effkern::backward, "");
  EFFKERN_REGISTER_ATTENTION_BY_SCORES(m, effkern::forward_by_scores, effkern::backward_by_scores,
                                       "");
}
