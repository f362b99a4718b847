#include "cuda/norm_backward.cuh"
#include "cuda/norm_forward.cuh"
#include "math/crms_norm.h"

namespace effkern::cuda {

NormKernels crms_norm() {
  return {run_forward<CrmsNorm>, backward_workspace<CrmsNorm>, run_backward<CrmsNorm>};
}

}  // namespace effkern::cuda
