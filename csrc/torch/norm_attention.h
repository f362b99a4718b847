// The kernel ops of NormSoftmax attention, for the bindings of any device.
#pragma once

#include <tuple>

#include "common/norm_attention.h"
#include "torch/arguments.h"

namespace effkern {

// Checked arguments; the tensors keep memory alive.
struct AttentionCall {
  Rows q, k;
  Device device;

  // Fills in `task`. `tau` must outlive the call.
  AttentionCall(AttentionTask& task, const Tensor& q_given, const Tensor& k_given,
                const Tensor& tau, double eps, double scale, bool causal)
      : q(four(q_given, "q")), k(four(k_given, "k")), device(device_of(q_given)) {
    task.dtype = dtype_of(q_given, "q");
    const auto qs = q_given.sizes(), ks = k_given.sizes();
    STD_TORCH_CHECK(k_given.scalar_type() == q_given.scalar_type() &&
                        device_of(k_given) == device && ks[0] == qs[0] && ks[3] == qs[3] &&
                        ks[1] > 0 && qs[1] % ks[1] == 0,
                    "k has shape ", text_of(ks), "; beside q of shape ", text_of(qs),
                    " it must have its batch, features, dtype and device, and heads that divide "
                    "q's");
    task.batch = qs[0], task.heads = qs[1], task.rows = qs[2], task.features = qs[3];
    task.key_heads = ks[1], task.keys = ks[2];
    task.q = q.data(), task.q_rows = q.layout;
    task.k = k.data(), task.k_rows = k.layout;
    STD_TORCH_CHECK(tau.numel() == 1 && dtype_of(tau, "tau") == accumulation_of(task.dtype) &&
                        device_of(tau) == device,
                    "tau must be one number of the accumulation type on q's device");
    task.tau = tau.const_data_ptr();
    task.eps = eps, task.scale = scale, task.causal = causal;
  }

  static Rows four(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.sizes().size() == 4, name, " has shape ", text_of(tensor.sizes()),
                    "; it must have 4 dimensions");
    return rows_of(tensor, 1);
  }

  // A new tensor of the shape and dtype of another.
  Tensor like(const Tensor& tensor) const {
    return empty(tensor.sizes().data(), 4, dtype_of(tensor, "input"), device);
  }
};

// The same for the division of the queries.
struct DivisionCall : AttentionCall {
  OptionalTensor seen;

  DivisionCall(NormAttentionTask& task, const Tensor& q_given, const Tensor& k_given,
               const OptionalTensor& seen_given, const Tensor& tau, double eps, double scale,
               bool causal)
      : AttentionCall(task, q_given, k_given, tau, eps, scale, causal) {
    task.seen = nullptr;
    if (seen_given) set_seen(task, *seen_given);
  }

 private:
  void set_seen(NormAttentionTask& task, const Tensor& given) {
    const auto sizes = given.sizes();
    STD_TORCH_CHECK(given.scalar_type() == ScalarType::Bool && device_of(given) == device &&
                        sizes.size() == 3 && (sizes[0] == 1 || sizes[0] == task.batch) &&
                        (sizes[1] == 1 || sizes[1] == task.key_heads) && sizes[2] == task.keys,
                    "seen has shape ", text_of(sizes),
                    "; it must be bool, on q's device, of one or k's batches, one or k's heads, "
                    "and k's keys");
    seen = torch::stable::contiguous(given);
    task.seen = static_cast<const uint8_t*>(seen->const_data_ptr());
    task.seen_head_stride = sizes[1] == 1 ? 0 : task.keys;
    task.seen_batch_stride = sizes[0] == 1 ? 0 : sizes[1] * task.keys;
  }
};

using RunNormAttentionForward = void (*)(const NormAttentionForward&, Device);
using RunNormAttentionBackward = void (*)(const NormAttentionBackward&, Device);

// The ops, where kForward and kBackward do the work on the binding's device.
template <RunNormAttentionForward kForward, RunNormAttentionBackward kBackward>
struct NormAttentionOps {
  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k,
                                                    const OptionalTensor& seen, const Tensor& tau,
                                                    double eps, double scale, bool causal) {
    NormAttentionForward task;
    const DivisionCall call(task, q, k, seen, tau, eps, scale, causal);
    Tensor scaled = call.like(q);
    const int64_t sizes[] = {task.batch, task.key_heads, 1, task.features};
    Tensor offset = empty(sizes, 4, task.dtype, call.device);
    Tensor deviation = empty(q.sizes().data(), 3, accumulation_of(task.dtype), call.device);
    task.scaled = scaled.mutable_data_ptr();
    task.offset = offset.mutable_data_ptr();
    task.deviation = deviation.mutable_data_ptr();
    if (task.features > 0) kForward(task, call.device);
    return {std::move(scaled), std::move(offset), std::move(deviation)};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_q,
                                                     const OptionalTensor& grad_k, const Tensor& q,
                                                     const Tensor& k, const OptionalTensor& seen,
                                                     const Tensor& deviation, const Tensor& tau,
                                                     double eps, double scale, bool causal) {
    NormAttentionBackward task;
    const DivisionCall call(task, q, k, seen, tau, eps, scale, causal);
    check_like(grad_q, "grad_q", q, "q");
    const Rows grad_q_rows = AttentionCall::four(grad_q, "grad_q");
    task.grad_q = grad_q_rows.data(), task.grad_q_rows = grad_q_rows.layout;
    task.grad_k = nullptr;
    std::optional<Rows> grad_k_rows;
    if (grad_k) {
      check_like(*grad_k, "grad_k", k, "k");
      grad_k_rows = AttentionCall::four(*grad_k, "grad_k");
      task.grad_k = grad_k_rows->data(), task.grad_k_rows = grad_k_rows->layout;
    }
    STD_TORCH_CHECK(dtype_of(deviation, "deviation") == accumulation_of(task.dtype) &&
                        deviation.numel() == task.batch * task.heads * task.rows &&
                        device_of(deviation) == call.device,
                    "deviation must be what the forward returned for q");
    const Tensor deviations = torch::stable::contiguous(deviation);
    task.deviation = deviations.const_data_ptr();
    Tensor of_q = call.like(q), of_k = call.like(k);
    Tensor of_divisor = empty(q.sizes().data(), 3, accumulation_of(task.dtype), call.device);
    task.of_q = of_q.mutable_data_ptr();
    task.of_k = of_k.mutable_data_ptr();
    task.of_divisor = of_divisor.mutable_data_ptr();
    if (task.features > 0) {
      kBackward(task, call.device);
    } else {
      torch::stable::zero_(of_divisor);
    }
    return {std::move(of_q), std::move(of_k), std::move(of_divisor)};
  }
};

}  // namespace effkern

#define EFFKERN_REGISTER_NORM_ATTENTION(m, kForward, kBackward, overload)              \
  using norm_attention_ops = effkern::NormAttentionOps<kForward, kBackward>;           \
  m.impl("_norm_attention_forward" overload, TORCH_BOX(&norm_attention_ops::forward)); \
  m.impl("_norm_attention_backward" overload, TORCH_BOX(&norm_attention_ops::backward))
