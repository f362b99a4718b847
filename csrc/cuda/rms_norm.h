// RMSNorm on the GPU. Tasks: common/rms_norm.h; formulas: math/rms_norm.h.
//
// The kernels take weights of the dtype of x or of the accumulation type.
#pragma once

#include <cuda_runtime_api.h>

#include "common/rms_norm.h"

namespace effkern::cuda {

void rms_norm_forward(const RmsNormForward& task, cudaStream_t stream);

// `workspace`: that many bytes on the device, at an address that is a multiple of 16. Results
// depend on the shape and the values alone.
int64_t rms_norm_backward_workspace(const RmsNormBackward& task);
void rms_norm_backward(const RmsNormBackward& task, void* workspace, cudaStream_t stream);

}  // namespace effkern::cuda
