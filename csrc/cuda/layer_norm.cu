#include "cuda/norm_backward.cuh"
#include "cuda/norm_forward.cuh"
#include "math/layer_norm.h"

namespace effkern::cuda {

NormKernels layer_norm() {
  return {run_forward<LayerNorm>, backward_workspace<LayerNorm>, run_backward<LayerNorm>};
}

}  // namespace effkern::cuda
