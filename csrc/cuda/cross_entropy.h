// NormSoftmax's cross-entropy on the GPU. Task: common/cross_entropy.h; formula:
// math/cross_entropy.h.
#pragma once

#include <cuda_runtime_api.h>

#include "common/cross_entropy.h"

namespace effkern::cuda {

void norm_softmax_cross_entropy(const NormSoftmaxCrossEntropyTask& task, cudaStream_t stream);

}  // namespace effkern::cuda
