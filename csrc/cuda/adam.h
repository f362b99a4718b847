// One Adam step of any number of tensors in one launch. Formula: math/adam.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/adam.h"
#include "common/dtype.h"
#include "common/multi_tensor.h"

namespace effkern::cuda {

struct AdamLaunch {
  DType dtype;            // of parameters, gradients and states
  const int64_t* table;   // on the device: a row of kTableColumns per tensor
  const int32_t* chunks;  // on the device: a row of kChunkColumns per block
  int64_t chunk_count;
  int64_t elapsed;  // a tensor's step count t is its kSteps + elapsed
  AdamOptions options;
};

void adam(const AdamLaunch& task, cudaStream_t stream);

}  // namespace effkern::cuda
