// From the arguments of `_norm_softmax_forward` and `_norm_softmax_backward` to what the kernels
// are asked to do (common/norm_softmax.h). Device-neutral: a binding passes the functions that run
// the kernels.
#pragma once

#include <limits>
#include <tuple>
#include <vector>

#include "common/norm_softmax.h"
#include "torch/arguments.h"

namespace effkern {

// Of x: a tensor without a dimension passes for one of a single element.
struct SoftmaxShape {
  std::vector<int64_t> sizes;
  int64_t dim;
  int64_t rows = 1, features;

  SoftmaxShape(const Tensor& x, int64_t along)
      : sizes(x.sizes().begin(), x.sizes().end()), dim(along) {
    if (sizes.empty()) sizes.push_back(1);
    const int64_t ndim = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(0 <= dim && dim < ndim, "dim is ", dim, "; it must be from 0 to ", ndim - 1,
                    ", a dimension of x");
    features = sizes[static_cast<size_t>(dim)];
    for (int64_t d = 0; d < ndim; ++d) {
      if (d != dim) rows *= sizes[static_cast<size_t>(d)];
    }
  }

  // The rows of a tensor with these strides; nothing where its other dimensions do not collapse to
  // three.
  std::optional<StridedRows> rows_with(const std::vector<int64_t>& strides) const {
    std::vector<int64_t> of_sizes(sizes), of_strides(strides);
    of_sizes.erase(of_sizes.begin() + dim);
    of_strides.erase(of_strides.begin() + dim);
    const auto layout =
        collapsed(of_sizes.data(), of_strides.data(), static_cast<int64_t>(of_sizes.size()));
    if (!layout) return std::nullopt;
    return StridedRows{*layout, strides[static_cast<size_t>(dim)]};
  }
};

// A tensor as strided rows; `tensor` keeps the memory alive.
struct StridedTensor {
  Tensor tensor;
  StridedRows rows;
};

// The rows of a tensor, broadcast to the shape. Where its layout does not do, of a copy.
inline StridedTensor strided_rows_of(const Tensor& tensor, const char* name,
                                     const SoftmaxShape& shape) {
  const auto layout_of = [&](const Tensor& of) {
    const auto own = of.sizes(), own_strides = of.strides();
    const size_t ndim = shape.sizes.size();
    bool broadcastable = own.size() <= ndim;
    std::vector<int64_t> strides(ndim, 0);
    for (size_t d = 0; broadcastable && d < own.size(); ++d) {
      const size_t place = ndim - own.size() + d;
      if (own[d] == shape.sizes[place]) {
        strides[place] = own_strides[d];
      } else {
        broadcastable = own[d] == 1;
      }
    }
    STD_TORCH_CHECK(broadcastable, name, " has shape ", text_of(own),
                    "; it must be broadcastable to that of x, ", text_of(shape.sizes));
    return shape.rows_with(strides);
  };
  if (const auto layout = layout_of(tensor)) return {tensor, *layout};
  Tensor whole = torch::stable::new_empty(tensor, shape.sizes);
  torch::stable::copy_(whole, tensor);
  const StridedRows layout = *layout_of(whole);
  return {std::move(whole), layout};
}

// A task, and the tensors whose memory it names.
template <class Task>
struct SoftmaxCall {
  Task task{};
  SoftmaxShape shape;
  Device device;
  StridedTensor x, mask;

  SoftmaxCall(const Tensor& x_, const OptionalTensor& mask_, const OptionalTensor& tau,
              double tau_value, double eps, int64_t dim)
      : shape(x_, dim), device(device_of(x_)) {
    task.dtype = dtype_of(x_, "x");
    task.rows = shape.rows;
    task.features = shape.features;
    task.tau_value = tau_value;
    task.eps = eps;
    x = strided_rows_of(x_, "x", shape);
    task.x = x.tensor.const_data_ptr();
    task.x_rows = x.rows;
    if (mask_) set_mask(*mask_);
    if (tau) {
      check_device(*tau, "tau");
      STD_TORCH_CHECK(tau->numel() == 1 && dtype_of(*tau, "tau") == accumulation_of(task.dtype),
                      "tau must be one number of the accumulation type");
      task.tau = tau->const_data_ptr();
    }
  }
  SoftmaxCall(const SoftmaxCall&) = delete;
  SoftmaxCall& operator=(const SoftmaxCall&) = delete;

  // A new tensor like x, and its rows.
  StridedTensor output_like_x() const {
    const int64_t ndim = static_cast<int64_t>(x.tensor.sizes().size());
    return strided_rows_of(empty(shape.sizes.data(), ndim, task.dtype, device), "output", shape);
  }

 private:
  void check_device(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(device_of(tensor) == device, name,
                    " is on another device; it must be on the device of x");
  }

  void set_mask(const Tensor& given) {
    check_device(given, "mask");
    if (given.scalar_type() == ScalarType::Bool) {
      task.mask_kind = MaskKind::kBool;
    } else {
      const DType dtype = dtype_of(given, "mask");
      STD_TORCH_CHECK(dtype == task.dtype || dtype == accumulation_of(task.dtype),
                      "mask must be bool, of x's dtype or of the accumulation type");
      task.mask_kind =
          dtype == accumulation_of(task.dtype) ? MaskKind::kAccumulated : MaskKind::kAsInput;
      task.mask_hidden = lowest_of(dtype) / 2;
    }
    mask = strided_rows_of(given, "mask", shape);
    task.mask = mask.tensor.const_data_ptr();
    task.mask_rows = mask.rows;
  }

  static double lowest_of(DType dtype) {
    switch (dtype) {
      case DType::kFloat32:
        return std::numeric_limits<float>::lowest();
      case DType::kFloat64:
        return std::numeric_limits<double>::lowest();
      case DType::kBFloat16:
        return -0x1.fep127;
      case DType::kFloat16:
        return -65504;
    }
    return 0;
  }
};

using RunNormSoftmaxForward = void (*)(const NormSoftmaxForward&, Device);
using RunNormSoftmaxBackward = void (*)(const NormSoftmaxBackward&, Device);

// The ops, where kForward and kBackward do the work on the binding's device.
template <RunNormSoftmaxForward kForward, RunNormSoftmaxBackward kBackward>
struct NormSoftmaxOps {
  static Tensor forward(const Tensor& x, const OptionalTensor& mask, const OptionalTensor& tau,
                        double tau_value, double eps, int64_t dim) {
    SoftmaxCall<NormSoftmaxForward> call(x, mask, tau, tau_value, eps, dim);
    const StridedTensor y = call.output_like_x();
    call.task.y = y.tensor.mutable_data_ptr();
    call.task.y_rows = y.rows;
    if (y.tensor.numel() > 0) kForward(call.task, call.device);
    return y.tensor;
  }

  // The gradient of x, and each row's share of tau's; empty where not wanted.
  static std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                             const OptionalTensor& mask, const OptionalTensor& tau,
                                             double tau_value, double eps, int64_t dim,
                                             bool wants_x, bool wants_tau) {
    check_like(grad, "grad", x, "x");
    SoftmaxCall<NormSoftmaxBackward> call(x, mask, tau, tau_value, eps, dim);
    NormSoftmaxBackward& task = call.task;
    const StridedTensor grads = strided_rows_of(grad, "grad", call.shape);
    task.grad = grads.tensor.const_data_ptr();
    task.grad_rows = grads.rows;
    Tensor grad_x = absent(task.dtype, call.device);
    if (wants_x) {
      const StridedTensor out = call.output_like_x();
      grad_x = out.tensor;
      task.grad_x = grad_x.mutable_data_ptr();
      task.grad_x_rows = out.rows;
    }
    const int64_t shares = wants_tau ? task.rows : 0;
    Tensor grad_tau = empty(&shares, 1, accumulation_of(task.dtype), call.device);
    if (wants_tau) task.grad_tau = grad_tau.mutable_data_ptr();
    if (task.rows > 0 && task.features > 0) {
      kBackward(task, call.device);
    } else {
      torch::stable::zero_(grad_tau);
    }
    return {std::move(grad_x), std::move(grad_tau)};
  }
};

}  // namespace effkern

#define EFFKERN_REGISTER_NORM_SOFTMAX(m, kForward, kBackward, overload)            \
  using norm_softmax_ops = effkern::NormSoftmaxOps<kForward, kBackward>;           \
  m.impl("_norm_softmax_forward" overload, TORCH_BOX(&norm_softmax_ops::forward)); \
  m.impl("_norm_softmax_backward" overload, TORCH_BOX(&norm_softmax_ops::backward))
