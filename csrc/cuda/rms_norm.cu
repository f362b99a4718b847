#include "cuda/norm_backward.cuh"
#include "cuda/norm_forward.cuh"
#include "math/rms_norm.h"

namespace effkern::cuda {

NormKernels rms_norm() {
  return {run_forward<RmsNorm>, backward_workspace<RmsNorm>, run_backward<RmsNorm>};
}

}  // namespace effkern::cuda
