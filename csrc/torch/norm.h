// From the arguments of the norms' kernel ops (`_rms_norm_forward`, `_rms_norm_inference`,
// `_add_rms_norm_forward`, `_rms_norm_backward`, and so for crms_norm and layer_norm) to what the
// kernels are asked to do (common/norm.h). Device-neutral: a binding passes the functions that run
// the kernels.
#pragma once

#include <tuple>

#include "common/norm.h"
#include "torch/arguments.h"

namespace effkern {

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

// The weight and the bias of a call as the kernels take them: contiguous, both in the dtype of x or
// both in its accumulation type.
class NormParameters {
 public:
  NormParameters(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x,
                 DType x_dtype, const NormExtents& extents, Device device)
      : dtype_(x_dtype) {
    if (weight) {
      given_ = dtype_ = checked(*weight, "weight", x, extents, device);
      if (dtype_ != x_dtype) dtype_ = accumulation_of(x_dtype);
      weight_ = as_taken(*weight);
    }
    if (bias) {
      STD_TORCH_CHECK(checked(*bias, "bias", x, extents, device) == given_,
                      "bias needs a weight of its dtype beside it");
      bias_ = as_taken(*bias);
    }
  }

  DType dtype() const { return dtype_; }
  bool is_converted() const { return given_ && dtype_ != *given_; }
  const void* weight() const { return weight_ ? weight_->const_data_ptr() : nullptr; }
  const void* bias() const { return bias_ ? bias_->const_data_ptr() : nullptr; }

 private:
  static DType checked(const Tensor& parameter, const char* name, const Tensor& x,
                       const NormExtents& extents, Device device) {
    const auto sizes = parameter.sizes(), of_x = x.sizes();
    STD_TORCH_CHECK(
        std::equal(sizes.begin(), sizes.end(), of_x.begin() + extents.leading, of_x.end()), name,
        " has shape ", text_of(sizes), "; it must have that of the normalised ",
        "dimensions of x, whose shape is ", text_of(of_x));
    STD_TORCH_CHECK(device_of(parameter) == device, name,
                    " is on another device; it must be on the device of x");
    return dtype_of(parameter, name);
  }

  Tensor as_taken(const Tensor& parameter) const {
    if (!is_converted()) {
      return parameter.is_contiguous() ? parameter : torch::stable::contiguous(parameter);
    }
    const bool wide = dtype_ == DType::kFloat64;
    return torch::stable::contiguous(
        torch::stable::to(parameter, wide ? ScalarType::Double : ScalarType::Float));
  }

  OptionalTensor weight_, bias_;
  std::optional<DType> given_;  // the dtype that the caller has them in; nothing without a weight
  DType dtype_;
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
  Tensor y;
  OptionalTensor statistics;  // where they are wanted
  OptionalTensor total;       // where there is a residual
};

// `run` does the work.
inline NormOutputs call_norm_forward(Norm norm, const Tensor& x, const Tensor* residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     int64_t dims, double eps, bool wants_statistics,
                                     RunNormForward run) {
  const DType dtype = dtype_of(x, "x");
  const Device device = device_of(x);
  const NormExtents extents(x, dims);

  NormForward p{};
  p.norm = norm;
  p.dtype = dtype;
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
  const NormParameters parameters(weight, bias, x, dtype, extents, device);
  p.weight_dtype = parameters.dtype();
  p.weight = parameters.weight();
  p.bias = parameters.bias();

  const int64_t* sizes = x.sizes().data();
  NormOutputs out{empty(sizes, x.dim(), dtype, device), std::nullopt, std::nullopt};
  p.y = out.y.mutable_data_ptr();
  if (wants_statistics) {
    out.statistics = norm_statistics(norm, x, extents.leading, accumulation_of(dtype), device);
    p.statistics = out.statistics->mutable_data_ptr();
  }
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
  p.dtype = dtype;
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
  const NormParameters parameters(weight, x_is_y ? bias : std::nullopt, x, dtype, extents, device);
  p.x_is_y = x_is_y;
  p.weight_dtype = parameters.dtype();
  p.weight = parameters.weight();
  p.bias = parameters.bias();

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
    if (gradient && parameters.is_converted()) {
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
    NormOutputs out = call_norm_forward(kNorm, x, nullptr, weight, bias, dims, eps, true, kForward);
    return {std::move(out.y), *std::move(out.statistics)};
  }
  static Tensor inference(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          int64_t dims, double eps) {
    return call_norm_forward(kNorm, x, nullptr, weight, bias, dims, eps, false, kForward).y;
  }
  static std::tuple<Tensor, Tensor, Tensor> add_forward(const Tensor& x, const Tensor& residual,
                                                        const OptionalTensor& weight,
                                                        const OptionalTensor& bias, int64_t dims,
                                                        double eps) {
    NormOutputs out =
        call_norm_forward(kNorm, x, &residual, weight, bias, dims, eps, true, kForward);
    return {std::move(out.y), *std::move(out.total), *std::move(out.statistics)};
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
  m.impl("_" #name "_inference" overload, TORCH_BOX(&name##_ops::inference));     \
  m.impl("_add_" #name "_forward" overload, TORCH_BOX(&name##_ops::add_forward)); \
  m.impl("_" #name "_backward" overload, TORCH_BOX(&name##_ops::backward))
#define EFFKERN_REGISTER_NORMS(m, kForward, kBackward, overload)                            \
  EFFKERN_REGISTER_NORM(m, rms_norm, effkern::Norm::kRms, kForward, kBackward, overload);   \
  EFFKERN_REGISTER_NORM(m, crms_norm, effkern::Norm::kCrms, kForward, kBackward, overload); \
  EFFKERN_REGISTER_NORM(m, layer_norm, effkern::Norm::kLayer, kForward, kBackward, overload)
