// The kernel ops of attention with NormSoftmax by its scores, for the bindings of any device.
#pragma once

#include <tuple>

#include "torch/norm_attention.h"

namespace effkern {

// Checked arguments; the tensors keep memory alive.
struct ByScoresCall : AttentionCall {
  Rows v;
  OptionalTensor mask;

  ByScoresCall(AttentionByScoresTask& task, const Tensor& q_given, const Tensor& k_given,
               const Tensor& v_given, const OptionalTensor& mask_given, const Tensor& tau,
               double eps, double scale, bool causal)
      : AttentionCall(task, q_given, k_given, tau, eps, scale, causal), v(four(v_given, "v")) {
    const auto ks = k_given.sizes(), vs = v_given.sizes();
    STD_TORCH_CHECK(v_given.scalar_type() == q_given.scalar_type() &&
                        device_of(v_given) == device && vs[0] == ks[0] && vs[1] == ks[1] &&
                        vs[2] == ks[2],
                    "v has shape ", text_of(vs), "; beside k of shape ", text_of(ks),
                    " it must have its batch, heads, keys, dtype and device");
    task.value_features = vs[3];
    task.v = v.data(), task.v_rows = v.layout;
    task.mask_kind = MaskKind::kNone;
    task.mask = nullptr;
    if (mask_given) set_mask(task, *mask_given);
  }

 private:
  void set_mask(AttentionByScoresTask& task, const Tensor& given) {
    const bool is_bool = given.scalar_type() == ScalarType::Bool;
    const DType acc = accumulation_of(task.dtype);
    STD_TORCH_CHECK(device_of(given) == device && (is_bool || dtype_of(given, "mask") == acc),
                    "mask must be bool or of the accumulation type, on q's device");
    const auto sizes = given.sizes();
    const auto fits = [&](size_t d, int64_t size) { return sizes[d] == 1 || sizes[d] == size; };
    STD_TORCH_CHECK(sizes.size() == 4 && fits(0, task.batch) && fits(1, task.heads) &&
                        fits(2, task.rows) && sizes[3] == task.keys,
                    "mask has shape ", text_of(sizes),
                    "; it must have 4 dimensions: one or q's batches, heads and rows, and k's "
                    "keys");
    mask = given.strides()[3] == 1 || task.keys == 1 ? given : torch::stable::contiguous(given);
    const auto strides = mask->strides();
    const auto stride = [&](size_t d) { return sizes[d] == 1 ? 0 : strides[d]; };
    task.mask_kind = is_bool ? MaskKind::kBool : MaskKind::kAccumulated;
    task.mask_hidden =
        (acc == DType::kFloat64 ? std::numeric_limits<double>::lowest()
                                : static_cast<double>(std::numeric_limits<float>::lowest())) /
        2;
    task.mask = mask->const_data_ptr();
    task.mask_batch_stride = stride(0);
    task.mask_head_stride = stride(1);
    task.mask_row_stride = stride(2);
  }
};

using RunAttentionByScoresForward = void (*)(const AttentionByScoresForward&, Device);
using RunAttentionByScoresBackward = void (*)(const AttentionByScoresBackward&, Device);

// The ops, where kForward and kBackward do the work on the binding's device.
template <RunAttentionByScoresForward kForward, RunAttentionByScoresBackward kBackward>
struct AttentionByScoresOps {
  static Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v,
                        const OptionalTensor& mask, const Tensor& tau, double eps, double scale,
                        bool causal) {
    AttentionByScoresForward task;
    const ByScoresCall call(task, q, k, v, mask, tau, eps, scale, causal);
    const int64_t sizes[] = {task.batch, task.heads, task.rows, task.value_features};
    Tensor y = empty(sizes, 4, task.dtype, call.device);
    task.y = y.mutable_data_ptr();
    kForward(task, call.device);
    return y;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q,
                                                             const Tensor& k, const Tensor& v,
                                                             const OptionalTensor& mask,
                                                             const Tensor& tau, double eps,
                                                             double scale, bool causal,
                                                             bool wants_tau) {
    AttentionByScoresBackward task;
    const ByScoresCall call(task, q, k, v, mask, tau, eps, scale, causal);
    const auto given = grad.sizes();
    STD_TORCH_CHECK(grad.scalar_type() == q.scalar_type() && device_of(grad) == call.device &&
                        given.size() == 4 && given[0] == task.batch && given[1] == task.heads &&
                        given[2] == task.rows && given[3] == task.value_features,
                    "grad has shape ", text_of(given),
                    "; it must be of q's dtype, on its device, with its batch, heads and rows and "
                    "the features of v");
    const Rows grad_rows = AttentionCall::four(grad, "grad");
    task.grad = grad_rows.data(), task.grad_rows = grad_rows.layout;
    Tensor of_q = call.like(q), of_k = call.like(k), of_v = call.like(v);
    const DType acc = accumulation_of(task.dtype);
    Tensor of_tau =
        wants_tau ? empty(q.sizes().data(), 3, acc, call.device) : absent(acc, call.device);
    task.of_q = of_q.mutable_data_ptr();
    task.of_k = of_k.mutable_data_ptr();
    task.of_v = of_v.mutable_data_ptr();
    task.of_tau = wants_tau ? of_tau.mutable_data_ptr() : nullptr;
    kBackward(task, call.device);
    return {std::move(of_q), std::move(of_k), std::move(of_v), std::move(of_tau)};
  }
};

}  // namespace effkern

#define EFFKERN_REGISTER_ATTENTION_BY_SCORES(m, kForward, kBackward, overload)                   \
  using attention_by_scores_ops = effkern::AttentionByScoresOps<kForward, kBackward>;            \
  m.impl("_attention_by_scores_forward" overload, TORCH_BOX(&attention_by_scores_ops::forward)); \
  m.impl("_attention_by_scores_backward" overload, TORCH_BOX(&attention_by_scores_ops::backward))
