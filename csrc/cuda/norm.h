// Norms of rows on the GPU. Tasks: common/norm.h; formulas: math/*_norm.h.
//
// The kernels take weights and biases of the dtype of x or of the accumulation type.
#pragma once

#include <cuda_runtime_api.h>

#include "common/norm.h"

namespace effkern::cuda {

void norm_forward(const NormForward& task, cudaStream_t stream);

// `workspace`: that many bytes on the device, at an address that is a multiple of 16. Results
// depend on the shape and the values alone.
int64_t norm_backward_workspace(const NormBackward& task);
void norm_backward(const NormBackward& task, void* workspace, cudaStream_t stream);

// The same for one formula.
struct NormKernels {
  void (*forward)(const NormForward& task, cudaStream_t stream);
  int64_t (*backward_workspace)(const NormBackward& task);
  void (*backward)(const NormBackward& task, void* workspace, cudaStream_t stream);
};
NormKernels rms_norm();
NormKernels crms_norm();
NormKernels layer_norm();

// The gradients of the parameters, from shares x sums() x features numbers of the accumulation
// type.
void sum_shares(const NormBackward& task, const void* partial, int64_t shares, cudaStream_t stream);

}  // namespace effkern::cuda
