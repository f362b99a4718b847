// `_rms_norm_forward`, `_add_rms_norm_forward` and `_rms_norm_backward` for CUDA tensors. Declared
// in effkern/ops.
#include "cuda/rms_norm.h"
#include "torch/cuda_device.h"
#include "torch/rms_norm.h"

namespace effkern {
namespace {

void run(const RmsNormForward& task, Device device) {
  const CudaDevice current(device);
  cuda::rms_norm_forward(task, current.stream());
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad,
                                             const std::optional<Tensor>& grad_total,
                                             const Tensor& x, const std::optional<Tensor>& weight,
                                             const Tensor& rstd, int64_t dims, bool wants_x,
                                             bool wants_weight) {
  return call_rms_norm_backward(
      grad, grad_total, x, weight, rstd, dims, wants_x, wants_weight,
      [](const RmsNormBackward& task, Device device) {
        const CudaDevice current(device);
        // The allocator hands the memory out again only to work that is queued later on the same
        // stream.
        const Tensor workspace = empty_bytes(cuda::rms_norm_backward_workspace(task), device);
        cuda::rms_norm_backward(task, workspace.mutable_data_ptr(), current.stream());
      });
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, EFFKERN_CUDA_KEY, m) {
  m.impl("_rms_norm_forward" EFFKERN_CUDA_OVERLOAD,
         TORCH_BOX(&effkern::rms_norm_forward_op<effkern::run>));
  m.impl("_add_rms_norm_forward" EFFKERN_CUDA_OVERLOAD,
         TORCH_BOX(&effkern::add_rms_norm_forward_op<effkern::run>));
  m.impl("_rms_norm_backward" EFFKERN_CUDA_OVERLOAD, TORCH_BOX(&effkern::rms_norm_backward));
}
