#include "cuda/step.cuh"

namespace effkern::cuda {

void step(const StepLaunch& task, const Lion& rule, cudaStream_t stream) {
  run_step(task, rule, stream);
}

}  // namespace effkern::cuda
