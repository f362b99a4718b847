// From the arguments of `_rms_norm_forward`, `_add_rms_norm_forward` and `_rms_norm_backward` to
// what the kernels are asked to do (common/rms_norm.h). Device-neutral: a binding passes the
// function that runs the kernel.
#pragma once

#include <tuple>

#include "common/rms_norm.h"
#include "torch/arguments.h"

namespace effkern {

// Contiguous, in the dtype of x or in the accumulation type: all that the kernels take.
inline Tensor rms_norm_weight(const Tensor& weight, DType x_dtype, int64_t features,
                              Device device) {
  STD_TORCH_CHECK(weight.numel() == features, "weight has ", weight.numel(),
                  " elements; it must have the ", features, " of the normalised dimensions");
  STD_TORCH_CHECK(device_of(weight) == device,
                  "weight is on another device; it must be on the device of x");
  const DType accumulation = accumulation_of(x_dtype);
  const std::optional<DType> dtype = kernel_dtype_of(weight);
  const bool taken = dtype && (*dtype == x_dtype || *dtype == accumulation);
  if (taken && weight.is_contiguous()) return weight;
  if (taken) return torch::stable::contiguous(weight);
  return torch::stable::contiguous(torch::stable::to(
      weight, accumulation == DType::kFloat64 ? ScalarType::Double : ScalarType::Float));
}

// The extents of x as rows x features.
struct RmsNormExtents {
  int64_t leading = 0;  // how many dimensions the rows have
  int64_t rows = 1, features = 1;

  RmsNormExtents(const Tensor& x, int64_t dims) {
    const auto sizes = x.sizes();
    const int64_t ndim = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(0 < dims && dims <= ndim, "dims is ", dims, "; it must be from 1 to the ", ndim,
                    " dimensions of x");
    leading = ndim - dims;
    for (int64_t d = 0; d < leading; ++d) rows *= sizes[d];
    for (int64_t d = leading; d < ndim; ++d) features *= sizes[d];
  }
};

using RunRmsNormForward = void (*)(const RmsNormForward&, Device);

struct RmsNormOutputs {
  Tensor y, rstd;
  std::optional<Tensor> total;  // where there is a residual
};

// `run` does the work.
inline RmsNormOutputs call_rms_norm_forward(const Tensor& x, const Tensor* residual,
                                            const std::optional<Tensor>& weight, int64_t dims,
                                            double eps, RunRmsNormForward run) {
  const DType dtype = dtype_of(x, "x");
  const Device device = device_of(x);
  const RmsNormExtents extents(x, dims);
  const int64_t* sizes = x.sizes().data();

  RmsNormForward p{};
  p.dtype = p.weight_dtype = dtype;
  p.rows = extents.rows;
  p.features = extents.features;
  p.eps = eps;
  const Rows x_rows = rows_of(x, dims);
  p.x = x_rows.data();
  p.x_rows = x_rows.layout;

  std::optional<Rows> residual_rows;
  if (residual) {
    check_like(*residual, "residual", x, "x");
    residual_rows = rows_of(*residual, dims);
    p.residual = residual_rows->data();
    p.residual_rows = residual_rows->layout;
  }
  std::optional<Tensor> kernel_weight;
  if (weight) {
    kernel_weight = rms_norm_weight(*weight, dtype, p.features, device);
    p.weight_dtype = dtype_of(*kernel_weight, "weight");
    p.weight = kernel_weight->const_data_ptr();
  }

  RmsNormOutputs out{empty(sizes, x.dim(), dtype, device),
                     empty(sizes, extents.leading, accumulation_of(dtype), device), std::nullopt};
  p.y = out.y.mutable_data_ptr();
  p.rstd = out.rstd.mutable_data_ptr();
  if (residual) {
    out.total = empty(sizes, x.dim(), dtype, device);
    p.total = out.total->mutable_data_ptr();
  }
  if (p.rows > 0) run(static_cast<const RmsNormForward&>(p), device);
  return out;
}

// The ops, where kRun does the work on the binding's device.

template <RunRmsNormForward kRun>
std::tuple<Tensor, Tensor> rms_norm_forward_op(const Tensor& x, const std::optional<Tensor>& weight,
                                               int64_t dims, double eps) {
  RmsNormOutputs out = call_rms_norm_forward(x, nullptr, weight, dims, eps, kRun);
  return {std::move(out.y), std::move(out.rstd)};
}

template <RunRmsNormForward kRun>
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward_op(const Tensor& x, const Tensor& residual,
                                                           const std::optional<Tensor>& weight,
                                                           int64_t dims, double eps) {
  RmsNormOutputs out = call_rms_norm_forward(x, &residual, weight, dims, eps, kRun);
  return {std::move(out.y), *std::move(out.total), std::move(out.rstd)};
}

// run(const RmsNormBackward&, Device) does the work, also for zero rows: a wanted grad_weight is
// then zero. Returns grad_x, grad_weight.
template <class Run>
std::tuple<Tensor, Tensor> call_rms_norm_backward(const Tensor& grad,
                                                  const std::optional<Tensor>& grad_total,
                                                  const Tensor& x,
                                                  const std::optional<Tensor>& weight,
                                                  const Tensor& rstd, int64_t dims, bool wants_x,
                                                  bool wants_weight, Run&& run) {
  const DType dtype = dtype_of(x, "x");
  const Device device = device_of(x);
  const RmsNormExtents extents(x, dims);

  RmsNormBackward p{};
  p.dtype = p.weight_dtype = dtype;
  p.rows = extents.rows;
  p.features = extents.features;
  check_like(grad, "grad", x, "x");
  const Rows grad_rows = rows_of(grad, dims), x_rows = rows_of(x, dims);
  p.grad = grad_rows.data();
  p.grad_rows = grad_rows.layout;
  p.x = x_rows.data();
  p.x_rows = x_rows.layout;

  std::optional<Rows> grad_total_rows;
  if (grad_total && wants_x) {
    check_like(*grad_total, "grad_total", x, "x");
    grad_total_rows = rows_of(*grad_total, dims);
    p.grad_total = grad_total_rows->data();
    p.grad_total_rows = grad_total_rows->layout;
  }
  STD_TORCH_CHECK(rstd.numel() == p.rows && rstd.is_contiguous() && device_of(rstd) == device &&
                      dtype_of(rstd, "rstd") == accumulation_of(dtype),
                  "rstd must be what the forward returned for x: contiguous, one number a row");
  p.rstd = rstd.const_data_ptr();

  STD_TORCH_CHECK(weight || !wants_weight,
                  "wants_weight is true; without a weight it must be false");
  std::optional<Tensor> kernel_weight;
  if (weight) {
    kernel_weight = rms_norm_weight(*weight, dtype, p.features, device);
    p.weight_dtype = dtype_of(*kernel_weight, "weight");
    p.weight = kernel_weight->const_data_ptr();
  }

  Tensor grad_x = wants_x ? empty(x.sizes().data(), x.dim(), dtype, device) : absent(dtype, device);
  Tensor grad_weight = wants_weight
                           ? empty(weight->sizes().data(), weight->dim(), p.weight_dtype, device)
                           : absent(dtype, device);
  p.grad_x = wants_x ? grad_x.mutable_data_ptr() : nullptr;
  p.grad_weight = wants_weight ? grad_weight.mutable_data_ptr() : nullptr;
  run(static_cast<const RmsNormBackward&>(p), device);
  if (wants_weight && dtype_of(*weight, "weight") != p.weight_dtype) {
    grad_weight = torch::stable::to(grad_weight, weight->scalar_type());
  }
  return {std::move(grad_x), std::move(grad_weight)};
}

}  // namespace effkern
