// From the arguments of the norms' kernel ops (`_rms_norm_forward`, `_add_rms_norm_forward`,
// `_rms_norm_backward`, and so for crms_norm and layer_norm) to what the kernels are asked to do
// (common/norm.h). Device-neutral: a binding passes the functions that run the kernels.
#pragma once

#include <tuple>

#include "common/norm.h"
#include "torch/arguments.h"

namespace effkern {

// Contiguous, in the dtype of x or in the accumulation type: all that the kernels take.
inline Tensor norm_parameter(const Tensor& parameter, const char* name, DType x_dtype,
                             int64_t features, Device device) {
  STD_TORCH_CHECK(parameter.numel() == features, name, " has ", parameter.numel(),
                  " elements; it must have the ", features, " of the normalised dimensions");
  STD_TORCH_CHECK(device_of(parameter) == device, name,
                  " is on another device; it must be on the device of x");
  const DType accumulation = accumulation_of(x_dtype);
  const std::optional<DType> dtype = kernel_dtype_of(parameter);
  const bool taken = dtype && (*dtype == x_dtype || *dtype == accumulation);
  if (taken && parameter.is_contiguous()) return parameter;
  if (taken) return torch::stable::contiguous(parameter);
  return torch::stable::contiguous(torch::stable::to(
      parameter, accumulation == DType::kFloat64 ? ScalarType::Double : ScalarType::Float));
}

inline Tensor norm_bias(const Tensor& bias, const OptionalTensor& weight, DType x_dtype,
                        int64_t features, Device device) {
  STD_TORCH_CHECK(weight && bias.scalar_type() == weight->scalar_type(),
                  "bias needs a weight of its dtype beside it");
  return norm_parameter(bias, "bias", x_dtype, features, device);
}

// The extents of x as rows x features.
struct NormExtents {
  int64_t leading = 0;  // how many dimensions the rows have
  int64_t rows = 1, features = 1;

  NormExtents(const Tensor& x, int64_t dims) {
    const auto sizes = x.sizes();
    const int64_t ndim = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(0 < dims && dims <= ndim, "dims is ", dims, "; it must be from 1 to the ", ndim,
                    " dimensions of x");
    leading = ndim - dims;
    for (int64_t d = 0; d < leading; ++d) rows *= sizes[d];
    for (int64_t d = leading; d < ndim; ++d) features *= sizes[d];
  }
};

// One number a row, or two: then with a first dimension of 2.
inline Tensor norm_statistics(Norm norm, const Tensor& x, int64_t leading, DType dtype,
                              Device device) {
  const int64_t* const rows = x.sizes().data();
  if (numbers_of(norm) == 1) return empty(rows, leading, dtype, device);
  std::array<int64_t, 65> sizes{numbers_of(norm)};  // `empty` takes 64 dimensions at most
  std::copy(rows, rows + std::min<int64_t>(leading, 64), sizes.begin() + 1);
  return empty(sizes.data(), leading + 1, dtype, device);
}

using RunNormForward = void (*)(const NormForward&, Device);
using RunNormBackward = void (*)(const NormBackward&, Device);

struct NormOutputs {
  Tensor y, statistics;
  OptionalTensor total;  // where there is a residual
};

// `run` does the work.
inline NormOutputs call_norm_forward(Norm norm, const Tensor& x, const Tensor* residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     int64_t dims, double eps, RunNormForward run) {
  const DType dtype = dtype_of(x, "x");
  const Device device = device_of(x);
  const NormExtents extents(x, dims);

  NormForward p{};
  p.norm = norm;
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
  OptionalTensor kernel_weight, kernel_bias;
  if (weight) {
    kernel_weight = norm_parameter(*weight, "weight", dtype, p.features, device);
    p.weight_dtype = dtype_of(*kernel_weight, "weight");
    p.weight = kernel_weight->const_data_ptr();
  }
  if (bias) {
    kernel_bias = norm_bias(*bias, weight, dtype, p.features, device);
    p.bias = kernel_bias->const_data_ptr();
  }

  const int64_t* sizes = x.sizes().data();
  NormOutputs out{empty(sizes, x.dim(), dtype, device),
                  norm_statistics(norm, x, extents.leading, accumulation_of(dtype), device),
                  std::nullopt};
  p.y = out.y.mutable_data_ptr();
  p.statistics = out.statistics.mutable_data_ptr();
  if (residual) {
    out.total = empty(sizes, x.dim(), dtype, device);
    p.total = out.total->mutable_data_ptr();
  }
  if (p.rows > 0) run(static_cast<const NormForward&>(p), device);
  return out;
}

struct NormGradients {
  Tensor x, weight, bias;  // empty where not wanted
};

// `run` does the work, also for zero rows: wanted gradients of parameters are then zero.
inline NormGradients call_norm_backward(Norm norm, const Tensor& grad,
                                        const OptionalTensor& grad_total, const Tensor& x,
                                        const OptionalTensor& weight, const Tensor& statistics,
                                        int64_t dims, bool wants_x, bool wants_weight,
                                        bool wants_bias, bool x_is_y, const OptionalTensor& bias,
                                        RunNormBackward run) {
  const DType dtype = dtype_of(x, "x");
  const Device device = device_of(x);
  const NormExtents extents(x, dims);

  NormBackward p{};
  p.norm = norm;
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
  STD_TORCH_CHECK(statistics.numel() == numbers_of(norm) * p.rows && statistics.is_contiguous() &&
                      device_of(statistics) == device &&
                      dtype_of(statistics, "statistics") == accumulation_of(dtype),
                  "statistics must be what the forward returned for x: contiguous, ",
                  numbers_of(norm), " numbers a row");
  p.statistics = statistics.const_data_ptr();

  STD_TORCH_CHECK(weight || !(wants_weight || wants_bias),
                  "a gradient of a parameter is wanted; without a weight there is none");
  OptionalTensor kernel_weight;
  if (weight) {
    kernel_weight = norm_parameter(*weight, "weight", dtype, p.features, device);
    p.weight_dtype = dtype_of(*kernel_weight, "weight");
    p.weight = kernel_weight->const_data_ptr();
  }
  OptionalTensor kernel_bias;
  p.x_is_y = x_is_y;
  if (x_is_y && bias) {
    kernel_bias = norm_bias(*bias, weight, dtype, p.features, device);
    p.bias = kernel_bias->const_data_ptr();
  }

  const auto of_parameter = [&](bool wanted) {
    return wanted ? empty(weight->sizes().data(), weight->dim(), p.weight_dtype, device)
                  : absent(dtype, device);
  };
  NormGradients out{
      wants_x ? empty(x.sizes().data(), x.dim(), dtype, device) : absent(dtype, device),
      of_parameter(wants_weight), of_parameter(wants_bias)};
  p.grad_x = wants_x ? out.x.mutable_data_ptr() : nullptr;
  p.grad_weight = wants_weight ? out.weight.mutable_data_ptr() : nullptr;
  p.grad_bias = wants_bias ? out.bias.mutable_data_ptr() : nullptr;
  run(static_cast<const NormBackward&>(p), device);
  for (Tensor* gradient :
       {wants_weight ? &out.weight : nullptr, wants_bias ? &out.bias : nullptr}) {
    if (gradient && dtype_of(*weight, "weight") != p.weight_dtype) {
      *gradient = torch::stable::to(*gradient, weight->scalar_type());
    }
  }
  return out;
}

// The ops of a norm, where kForward and kBackward do the work on the binding's device.
template <Norm kNorm, RunNormForward kForward, RunNormBackward kBackward>
struct NormOps {
  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight,
                                            const OptionalTensor& bias, int64_t dims, double eps) {
    NormOutputs out = call_norm_forward(kNorm, x, nullptr, weight, bias, dims, eps, kForward);
    return {std::move(out.y), std::move(out.statistics)};
  }
  static std::tuple<Tensor, Tensor, Tensor> add_forward(const Tensor& x, const Tensor& residual,
                                                        const OptionalTensor& weight,
                                                        const OptionalTensor& bias, int64_t dims,
                                                        double eps) {
    NormOutputs out = call_norm_forward(kNorm, x, &residual, weight, bias, dims, eps, kForward);
    return {std::move(out.y), *std::move(out.total), std::move(out.statistics)};
  }
  static std::tuple<Tensor, Tensor, Tensor> backward(
      const Tensor& grad, const OptionalTensor& grad_total, const Tensor& x,
      const OptionalTensor& weight, const Tensor& statistics, int64_t dims, bool wants_x,
      bool wants_weight, bool wants_bias, bool x_is_y, const OptionalTensor& bias) {
    NormGradients out =
        call_norm_backward(kNorm, grad, grad_total, x, weight, statistics, dims, wants_x,
                           wants_weight, wants_bias, x_is_y, bias, kBackward);
    return {std::move(out.x), std::move(out.weight), std::move(out.bias)};
  }
};

}  // namespace effkern

// Registers the ops of one norm with the library `m`. Overload: what stands behind their names.
#define EFFKERN_REGISTER_NORM(m, name, kNorm, kForward, kBackward, overload)      \
  using name##_ops = effkern::NormOps<kNorm, kForward, kBackward>;                \
  m.impl("_" #name "_forward" overload, TORCH_BOX(&name##_ops::forward));         \
  m.impl("_add_" #name "_forward" overload, TORCH_BOX(&name##_ops::add_forward)); \
  m.impl("_" #name "_backward" overload, TORCH_BOX(&name##_ops::backward))
#define EFFKERN_REGISTER_NORMS(m, kForward, kBackward, overload)                            \
  EFFKERN_REGISTER_NORM(m, rms_norm, effkern::Norm::kRms, kForward, kBackward, overload);   \
  EFFKERN_REGISTER_NORM(m, crms_norm, effkern::Norm::kCrms, kForward, kBackward, overload); \
  EFFKERN_REGISTER_NORM(m, layer_norm, effkern::Norm::kLayer, kForward, kBackward, overload)
