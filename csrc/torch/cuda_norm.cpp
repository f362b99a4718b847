// The norms' kernel ops for CUDA tensors. Declared in effkern/ops.
#include "cuda/norm.h"
#include "torch/cuda_device.h"
#include "torch/norm.h"

namespace effkern {
namespace {

void forward(const NormForward& wanted, Device device) {
  const CudaDevice current(device);
  NormForward task = wanted;
  std::optional<Tensor> unwanted;
  if (!task.statistics) {
    // The kernels write them always: to ask costs a register that the longest rows do not have.
    const int64_t numbers = numbers_of(task.norm) * task.rows;
    unwanted = empty_bytes(numbers * size_of(accumulation_of(task.dtype)), device);
    task.statistics = unwanted->mutable_data_ptr();
  }
  cuda::norm_forward(task, current.stream());
}

void backward(const NormBackward& task, Device device) {
  const CudaDevice current(device);
  // The allocator hands the memory out again only to work that is queued later on the same stream.
  const Tensor workspace = empty_bytes(cuda::norm_backward_workspace(task), device);
  cuda::norm_backward(task, workspace.mutable_data_ptr(), current.stream());
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, EFFKERN_CUDA_KEY, m) {
  EFFKERN_REGISTER_NORMS(m, effkern::forward, effkern::backward, EFFKERN_CUDA_OVERLOAD);
}
