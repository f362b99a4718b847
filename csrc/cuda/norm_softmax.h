// NormSoftmax on the GPU. Tasks: common/norm_softmax.h; formula: math/norm_softmax.h.
#pragma once

#include <cuda_runtime_api.h>

#include "common/norm_softmax.h"

namespace effkern::cuda {

void norm_softmax_forward(const NormSoftmaxForward& task, cudaStream_t stream);
void norm_softmax_backward(const NormSoftmaxBackward& task, cudaStream_t stream);

}  // namespace effkern::cuda
