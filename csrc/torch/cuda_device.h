// What every CUDA op needs of torch: the device made current, its current stream, and the names to
// register under.
#pragma once

#include <cuda_runtime_api.h>

#include "torch/arguments.h"

// tests/simt registers the same functions as overloads named "simt" for CPU tensors.
#ifndef EFFKERN_CUDA_KEY
#define EFFKERN_CUDA_KEY CUDA
#define EFFKERN_CUDA_OVERLOAD ""
#endif

namespace effkern {

// While it lives, `device` is the current one.
class CudaDevice {
 public:
  explicit CudaDevice(Device device) : index_(device.index) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device.index, &guard_));
  }
  ~CudaDevice() { aoti_torch_delete_cuda_guard(guard_); }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  cudaStream_t stream() const {
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  CUDAGuardHandle guard_ = nullptr;
};

}  // namespace effkern
