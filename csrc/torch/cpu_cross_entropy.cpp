// The kernel op of NormSoftmax's cross-entropy for CPU tensors.
#include "common/advise.h"
#include "torch/cpu.h"
#include "torch/cross_entropy.h"

namespace effkern {
namespace {

void check_indices(const NormSoftmaxCrossEntropyTask& task) {
  if (task.target_kind != TargetKind::kIndices) return;
  const int64_t* const target = static_cast<const int64_t*>(task.target);
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t index = target[row];
    STD_TORCH_CHECK((0 <= index && index < task.classes) || index == task.ignore_index,
                    "target is ", index, " in row ", row, "; it must be from 0 to ",
                    task.classes - 1, " or ignore_index, ", task.ignore_index);
  }
}

void run(const NormSoftmaxCrossEntropyTask& task, Device) {
  check_indices(task);
  if (task.grad != task.logits) {
    advise_huge_pages(task.grad, task.rows * task.classes * size_of(task.dtype));
  }
  cpu::norm_softmax_cross_entropy(task, torch_threads);
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { EFFKERN_REGISTER_CROSS_ENTROPY(m, effkern::run, ""); }
