// The kernel ops of NormSoftmax for CPU tensors.
#include "common/advise.h"
#include "torch/cpu.h"
#include "torch/norm_softmax.h"

namespace effkern {
namespace {

void forward(const NormSoftmaxForward& args, Device) {
  advise_huge_pages(args.y, args.rows * args.features * size_of(args.dtype));
  cpu::norm_softmax_forward(args, torch_threads);
}

void backward(const NormSoftmaxBackward& args, Device) {
  advise_huge_pages(args.grad_x, args.rows * args.features * size_of(args.dtype));
  cpu::norm_softmax_backward(args, torch_threads);
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  EFFKERN_REGISTER_NORM_SOFTMAX(m, effkern::forward, effkern::backward, "");
}
