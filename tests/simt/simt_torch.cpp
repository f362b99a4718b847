// What the bindings get when they ask torch about CUDA, and memory that starts as NaNs. Declared by
// torch's own header, whose functions simt.h has renamed for the bindings.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>

extern "C" {

AOTITorchError simt_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError simt_delete_cuda_guard(CUDAGuardHandle) { return 0; }

AOTITorchError simt_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError simt_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                  int32_t dtype, int32_t device_type, int32_t device_index,
                                  AtenTensorHandle* tensor) {
  const AOTITorchError error =
      aoti_torch_empty_strided(ndim, sizes, strides, dtype, device_type, device_index, tensor);
  if (error) return error;
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  for (int64_t d = 0; d < ndim; ++d) bytes *= sizes[d];
  void* data;
  if (const AOTITorchError no_data = aoti_torch_get_data_ptr(*tensor, &data)) return no_data;
  if (bytes > 0) std::memset(data, 0xff, static_cast<size_t>(bytes));
  return 0;
}
}
