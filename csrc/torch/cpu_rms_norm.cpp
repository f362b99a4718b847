// effkern::_rms_norm_forward, _add_rms_norm_forward and _rms_norm_backward for CPU tensors.
#include "torch/advise.h"
#include "torch/cpu.h"
#include "torch/rms_norm.h"

namespace effkern {
namespace {

void run(const RmsNormForward& args, Device) {
  const int64_t bytes = args.rows * args.features * size_of(args.dtype);
  advise_huge_pages(args.y, bytes);
  advise_huge_pages(args.total, bytes);
  cpu::rms_norm_forward(args, torch_threads);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const std::optional<Tensor>& grad_total,
                                    const Tensor& x, const std::optional<Tensor>& weight,
                                    const Tensor& rstd, int64_t dims, bool wants_x,
                                    bool wants_weight) {
  return call_rms_norm_backward(
      grad, grad_total, x, weight, rstd, dims, wants_x, wants_weight,
      [](const RmsNormBackward& args, Device cpu) {
        advise_huge_pages(args.grad_x, args.rows * args.features * size_of(args.dtype));
        const int64_t shares =
            args.grad_weight ? cpu::rms_norm_chunks(args.rows).count * args.features : 0;
        const Tensor partial = empty(&shares, 1, accumulation_of(args.dtype), cpu);
        cpu::rms_norm_backward(args, partial.mutable_data_ptr(), torch_threads);
      });
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("_rms_norm_forward", TORCH_BOX(&effkern::rms_norm_forward_op<effkern::run>));
  m.impl("_add_rms_norm_forward", TORCH_BOX(&effkern::add_rms_norm_forward_op<effkern::run>));
  m.impl("_rms_norm_backward", TORCH_BOX(&effkern::backward));
}
