// What LAMB's launches have in common, however its tensors are stored: the sums of squares of a
// tensor's parameters and directions, and what the second launch needs of them.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/row_group.cuh"

namespace effkern::cuda {

// Where not all is stored in the parameters' dtype.
void mixed_step(const StepLaunch& task, const Lamb& rule, void* workspace, cudaStream_t stream);

namespace {

constexpr int kParamSquares = 0, kDirectionSquares = 1, kSums = 2;

// Shared memory for them.
struct LambSums {
  double scratch[2 * kSums][kStepThreads / kWarp];
  bool last;
};

// The sums over a block, the same bits in all its threads; `scratch` must not be that of the call
// before.
__device__ __forceinline__ void sum_over_block(double (&sums)[kSums],
                                               double (*scratch)[kStepThreads / kWarp]) {
  for (int i = 0; i < kSums; ++i) sums[i] = sum_over_group(sums[i], kStepThreads, scratch[i]);
}

// Every thread's sums make the block's; the tensor's last block adds those of all its blocks and
// leaves lr times the trust ratio in kRatio. `chunk` lies in shared memory.
template <class S>
__device__ __forceinline__ void leave_step_size(const Work<Lamb, S>& chunk, double (&sums)[kSums],
                                                LambSums& shared, double* workspace) {
  sum_over_block(sums, shared.scratch);
  double* const mine = workspace + block_index() * kSums;
  if (threadIdx.x == 0) {
    store(mine, Pack<double, kSums>{{sums[0], sums[1]}});
    shared.last = is_last(chunk.blocks);
  }
  __syncthreads();
  if (!shared.last) return;

  const double* const first = mine - chunk.index * kSums;
  sums[0] = sums[1] = 0;
  for (int64_t i = threadIdx.x; i < chunk.blocks.count; i += kStepThreads) {
    const Pack<double, kSums> of_block = load<kSums>(first + i * kSums);
    for (int k = 0; k < kSums; ++k) sums[k] += of_block.value[k];
  }
  sum_over_block(sums, shared.scratch + kSums);
  if (threadIdx.x == 0) {
    const double ratio = trust_ratio(sums[kParamSquares], sums[kDirectionSquares]);
    store(reinterpret_cast<S*>(chunk.row + kRatio), static_cast<S>(chunk.lr * ratio));
  }
}

}  // namespace
}  // namespace effkern::cuda
