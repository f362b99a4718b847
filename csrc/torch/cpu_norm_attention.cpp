// The kernel ops of NormSoftmax attention for CPU tensors.
#include "torch/advise.h"
#include "torch/cpu.h"
#include "torch/norm_attention.h"

namespace effkern {
namespace {

int64_t bytes_of_queries(const NormAttentionTask& task) {
  return task.batch * task.heads * task.rows * task.features * size_of(task.dtype);
}
int64_t bytes_of_keys(const NormAttentionTask& task) {
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

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  EFFKERN_REGISTER_NORM_ATTENTION(m, effkern::forward, effkern::backward, "");
}
