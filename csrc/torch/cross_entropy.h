// From the arguments of `_norm_softmax_cross_entropy` and its in-place form to what the kernels are
// asked to do (common/cross_entropy.h). Device-neutral: a binding passes the function that runs the
// kernels.
#pragma once

#include <tuple>

#include "common/cross_entropy.h"
#include "torch/arguments.h"

namespace effkern {

// Contiguous numbers of the accumulation type, as many as are wanted.
inline const void* numbers_of(const OptionalTensor& tensor, const char* name, const Tensor& logits,
                              int64_t count) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(device_of(*tensor) == device_of(logits), name,
                  " is on another device; it must be on the device of logits");
  STD_TORCH_CHECK(tensor->numel() == count && tensor->is_contiguous() &&
                      dtype_of(*tensor, name) == accumulation_of(dtype_of(logits, "logits")),
                  name, " must be ", count, " contiguous numbers of the accumulation type");
  return tensor->const_data_ptr();
}

using RunCrossEntropy = void (*)(const NormSoftmaxCrossEntropyTask&, Device);

// The op and its in-place form, where kRun does the work on the binding's device.
template <RunCrossEntropy kRun>
struct CrossEntropyOps {
  // Each row's loss, the gradient of the logits and each row's share of tau's; empty where not
  // wanted.
  static std::tuple<Tensor, Tensor, Tensor> run(const Tensor& logits, const Tensor& target,
                                                const OptionalTensor& weight,
                                                const OptionalTensor& tau, double tau_value,
                                                double eps, double label_smoothing,
                                                int64_t ignore_index, const OptionalTensor& scale,
                                                bool wants_logits, bool wants_tau) {
    const DType dtype = dtype_of(logits, "logits");
    Tensor grad = wants_logits
                      ? empty(logits.sizes().data(), logits.dim(), dtype, device_of(logits))
                      : absent(dtype, device_of(logits));
    auto [loss, grad_tau] = call(logits, target, weight, tau, tau_value, eps, label_smoothing,
                                 ignore_index, scale, wants_logits ? &grad : nullptr, wants_tau);
    return {std::move(loss), std::move(grad), std::move(grad_tau)};
  }

  // The same with the gradient written in place of the logits.
  static std::tuple<Tensor, Tensor> run_in_place(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight,
                                                 const OptionalTensor& tau, double tau_value,
                                                 double eps, double label_smoothing,
                                                 int64_t ignore_index, const Tensor& scale,
                                                 bool wants_tau) {
    STD_TORCH_CHECK(logits.numel() == 0 || row_layout(logits, 1),
                    "logits that are overwritten must have contiguous rows");
    return call(logits, target, weight, tau, tau_value, eps, label_smoothing, ignore_index, scale,
                &logits, wants_tau);
  }

 private:
  static std::tuple<Tensor, Tensor> call(const Tensor& logits, const Tensor& target,
                                         const OptionalTensor& weight, const OptionalTensor& tau,
                                         double tau_value, double eps, double label_smoothing,
                                         int64_t ignore_index, const OptionalTensor& scale,
                                         const Tensor* grad, bool wants_tau) {
    const Device device = device_of(logits);
    STD_TORCH_CHECK(logits.dim() == 2, "logits have ", logits.dim(),
                    " dimensions; they must have 2, rows and classes");
    NormSoftmaxCrossEntropyTask task{};
    task.dtype = dtype_of(logits, "logits");
    task.rows = logits.size(0);
    task.classes = logits.size(1);
    task.tau_value = tau_value;
    task.eps = eps;
    task.label_smoothing = label_smoothing;
    task.ignore_index = ignore_index;
    const DType accumulation = accumulation_of(task.dtype);
    const Rows logits_rows = rows_of(logits, 1);
    task.logits = logits_rows.data();
    task.logits_rows = logits_rows.layout;

    STD_TORCH_CHECK(device_of(target) == device,
                    "target is on another device; it must be on the device of logits");
    Rows target_rows;
    if (target.scalar_type() == ScalarType::Long) {
      STD_TORCH_CHECK(target.dim() == 1 && target.numel() == task.rows && target.is_contiguous(),
                      "target of class indices must be ", task.rows, " contiguous numbers");
      task.target_kind = TargetKind::kIndices;
      task.target = target.const_data_ptr();
    } else {
      const DType dtype = dtype_of(target, "target");
      STD_TORCH_CHECK(same_sizes(target, logits), "target has shape ", text_of(target.sizes()),
                      "; it must have that of logits, ", text_of(logits.sizes()));
      STD_TORCH_CHECK(dtype == task.dtype || dtype == accumulation,
                      "target must be int64, of logits' dtype or of the accumulation type");
      task.target_kind = dtype == accumulation ? TargetKind::kAccumulated : TargetKind::kAsLogits;
      target_rows = rows_of(target, 1);
      task.target = target_rows.data();
      task.target_rows = target_rows.layout;
    }
    task.weight = numbers_of(weight, "weight", logits, task.classes);
    task.tau = numbers_of(tau, "tau", logits, 1);
    if (scale) {
      const bool one = scale->numel() == 1;
      task.scale = numbers_of(scale, "scale", logits, one ? 1 : task.rows);
      task.scale_stride = one ? 0 : 1;
    }
    STD_TORCH_CHECK(scale || !(grad || wants_tau), "a gradient is wanted; it needs a scale");

    const int64_t shares = wants_tau ? task.rows : 0;
    Tensor loss = empty(&task.rows, 1, accumulation, device);
    Tensor grad_tau = empty(&shares, 1, accumulation, device);
    task.loss = loss.mutable_data_ptr();
    task.grad_tau = wants_tau ? grad_tau.mutable_data_ptr() : nullptr;
    if (grad) {
      task.grad = grad->mutable_data_ptr();
      task.grad_rows = grad == &logits ? task.logits_rows : rows_of(*grad, 1).layout;
    }
    if (task.rows > 0) kRun(task, device);
    return {std::move(loss), std::move(grad_tau)};
  }
};

}  // namespace effkern

#define EFFKERN_REGISTER_CROSS_ENTROPY(m, kRun, overload)                             \
  using cross_entropy_ops = effkern::CrossEntropyOps<kRun>;                           \
  m.impl("_norm_softmax_cross_entropy" overload, TORCH_BOX(&cross_entropy_ops::run)); \
  m.impl("_norm_softmax_cross_entropy_" overload, TORCH_BOX(&cross_entropy_ops::run_in_place))
