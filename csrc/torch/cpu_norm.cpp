// The norms' kernel ops for CPU tensors.
#include "common/advise.h"
#include "torch/cpu.h"
#include "torch/norm.h"

namespace effkern {
namespace {

void forward(const NormForward& args, Device) {
  const int64_t bytes = args.rows * args.features * size_of(args.dtype);
  advise_huge_pages(args.y, bytes);
  advise_huge_pages(args.total, bytes);
  cpu::norm_forward(args, torch_threads);
}

void backward(const NormBackward& args, Device cpu) {
  advise_huge_pages(args.grad_x, args.rows * args.features * size_of(args.dtype));
  const int64_t shares =
      args.sums() > 0 ? cpu::norm_chunks(args.rows).count * args.sums() * args.features : 0;
  const Tensor partial = empty(&shares, 1, accumulation_of(args.dtype), cpu);
  cpu::norm_backward(args, partial.mutable_data_ptr(), torch_threads);
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  EFFKERN_REGISTER_NORMS(m, effkern::forward, effkern::backward, "");
}
