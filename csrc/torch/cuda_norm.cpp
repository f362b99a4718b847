// The norms' kernel ops for CUDA tensors. Declared in effkern/ops.
#include "cuda/norm.h"
#include "torch/cuda_device.h"
#include "torch/norm.h"

namespace effkern {
namespace {

void forward(const NormForward& task, Device device) {
  const CudaDevice current(device);
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
