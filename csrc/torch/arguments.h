// What the CPU and the CUDA bindings both need of torch's tensors: dtypes, row layouts, outputs,
// checks. Header-only, device-neutral. Errors name the argument, what it was and what it must be.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "common/dtype.h"
#include "common/rows.h"

// PyTorch 2.10's headers have it under its older name only.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace effkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const = default;
};

inline Device device_of(const Tensor& tensor) {
  Device device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

inline int32_t torch_code_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return aoti_torch_dtype_float32();
    case DType::kFloat64:
      return aoti_torch_dtype_float64();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
  }
  STD_TORCH_CHECK(false, "unknown dtype code ", static_cast<int32_t>(dtype));
}

// Nothing where the kernels do not take the tensor's dtype.
inline std::optional<DType> kernel_dtype_of(const Tensor& tensor) {
  constexpr std::array kDtypes{DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  // Asked of torch once: beside a small tensor's work, each of its functions is far away.
  static const std::array<int32_t, kDtypes.size()> codes = [&] {
    std::array<int32_t, kDtypes.size()> codes;
    for (size_t i = 0; i < kDtypes.size(); ++i) codes[i] = torch_code_of(kDtypes[i]);
    return codes;
  }();
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  for (size_t i = 0; i < kDtypes.size(); ++i) {
    if (code == codes[i]) return kDtypes[i];
  }
  return std::nullopt;
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  const std::optional<DType> dtype = kernel_dtype_of(tensor);
  STD_TORCH_CHECK(dtype, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                  "; it must be float32, float64, bfloat16 or float16");
  return *dtype;
}

inline std::string text_of(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::string text = "(";
  for (const int64_t value : values) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(value);
  }
  return text + ")";
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// `tensor` must have the device and sizes of `like`, and its dtype or the one given.
inline void check_like(const Tensor& tensor, const std::string& name, const Tensor& like,
                       const char* like_name, ScalarType type) {
  STD_TORCH_CHECK(device_of(tensor) == device_of(like), name,
                  " is on another device; it must be on the device of ", like_name);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()),
                  type == like.scalar_type() ? "; it must have that of " : "; beside ", like_name,
                  type == like.scalar_type() ? ", " : " it must be ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(same_sizes(tensor, like), name, " has shape ", text_of(tensor.sizes()),
                  "; it must have that of ", like_name, ", ", text_of(like.sizes()));
}
inline void check_like(const Tensor& tensor, const std::string& name, const Tensor& like,
                       const char* like_name) {
  check_like(tensor, name, like, like_name, like.scalar_type());
}

// A new contiguous tensor, its memory unwritten.
inline Tensor empty(const int64_t* sizes, int64_t ndim, DType dtype, Device device) {
  constexpr int64_t kMaxDims = 64;
  STD_TORCH_CHECK(ndim <= kMaxDims, "a tensor has ", ndim, " dimensions; at most ", kMaxDims,
                  " are supported");
  std::array<int64_t, kMaxDims> strides;
  int64_t stride = 1;
  for (int64_t d = ndim; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      ndim, sizes, strides.data(), torch_code_of(dtype), device.type, device.index, &handle));
  return Tensor(handle);
}

// What stands for an output that nobody asked for: shape (0,).
inline Tensor absent(DType dtype, Device device) {
  const int64_t none = 0;
  return empty(&none, 1, dtype, device);
}

// Memory for a kernel's own use, freed with the tensor.
inline Tensor empty_bytes(int64_t bytes, Device device) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &bytes, &stride, aoti_torch_dtype_uint8(), device.type, device.index, &handle));
  return Tensor(handle);
}

// A tensor as rows of contiguous features; `tensor` keeps the memory alive.
struct Rows {
  Tensor tensor;
  RowLayout layout;
  const void* data() const { return tensor.const_data_ptr(); }
};

// Dimensions as the three of a RowLayout; nothing where they do not collapse to three.
inline std::optional<RowLayout> collapsed(const int64_t* sizes, const int64_t* strides,
                                          int64_t ndim) {
  std::array<int64_t, 3> size{1, 1, 1}, stride{0, 0, 0};  // innermost first
  int used = 0;
  for (int64_t d = ndim; d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (used > 0 && strides[d] == stride[used - 1] * size[used - 1]) {
      size[used - 1] *= sizes[d];
      continue;
    }
    if (used == 3) return std::nullopt;
    size[used] = sizes[d];
    stride[used++] = strides[d];
  }
  if (used <= 1) return RowLayout{1, 1, stride[0], 0, 0};
  return RowLayout{used == 3 ? size[1] : 1, size[0], used == 3 ? stride[2] : stride[1],
                   used == 3 ? stride[1] : 0, stride[0]};
}

// The layout of a tensor whose last `dims` dimensions are the features; nothing where the features
// are not contiguous or the leading dimensions do not collapse to three.
inline std::optional<RowLayout> row_layout(const Tensor& tensor, int64_t dims) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t ndim = static_cast<int64_t>(sizes.size());
  int64_t features = 1;
  for (int64_t d = ndim; d-- > ndim - dims;) {
    if (sizes[d] != 1 && strides[d] != features) return std::nullopt;
    features *= sizes[d];
  }
  return collapsed(sizes.data(), strides.data(), ndim - dims);
}

// The rows of a tensor, copied to a contiguous one where `row_layout` finds none.
inline Rows rows_of(const Tensor& tensor, int64_t dims) {
  if (tensor.numel() == 0) return Rows{tensor, RowLayout{1, 1, 0, 0, 0}};
  if (const auto layout = row_layout(tensor, dims)) return Rows{tensor, *layout};
  Tensor copy = torch::stable::contiguous(tensor);
  const RowLayout layout = *row_layout(copy, dims);
  return Rows{std::move(copy), layout};
}

}  // namespace effkern
