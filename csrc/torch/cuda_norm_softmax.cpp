// The kernel ops of NormSoftmax for CUDA tensors. Declared in effkern/ops.
#include "cuda/norm_softmax.h"
#include "torch/cuda_device.h"
#include "torch/norm_softmax.h"

namespace effkern {
namespace {

void forward(const NormSoftmaxForward& task, Device device) {
  const CudaDevice current(device);
  cuda::norm_softmax_forward(task, current.stream());
}

void backward(const NormSoftmaxBackward& task, Device device) {
  const CudaDevice current(device);
  cuda::norm_softmax_backward(task, current.stream());
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, EFFKERN_CUDA_KEY, m) {
  EFFKERN_REGISTER_NORM_SOFTMAX(m, effkern::forward, effkern::backward, EFFKERN_CUDA_OVERLOAD);
}
