// The kernel op of NormSoftmax's cross-entropy for CUDA tensors. Declared in effkern/ops.
#include "cuda/cross_entropy.h"
#include "torch/cross_entropy.h"
#include "torch/cuda_device.h"

namespace effkern {
namespace {

void run(const NormSoftmaxCrossEntropyTask& task, Device device) {
  const CudaDevice current(device);
  cuda::norm_softmax_cross_entropy(task, current.stream());
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, EFFKERN_CUDA_KEY, m) {
  EFFKERN_REGISTER_CROSS_ENTROPY(m, effkern::run, EFFKERN_CUDA_OVERLOAD);
}
