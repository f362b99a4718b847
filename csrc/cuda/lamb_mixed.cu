// LAMB's two launches where not all tensors have the parameters' dtype; see lamb.cu and mixed.cuh.
//
// Bytes: the first launch reads gradient, parameter (or master), states and scales and writes
// states and scales; the second reads parameter, states and scales and writes the parameter, and
// its master.
#include "cuda/lamb.cuh"
#include "cuda/mixed.cuh"

namespace effkern::cuda {
namespace {

using LambChunk = MixedChunk<Lamb>;

// Shared memory of the first launch.
struct MixedAdvance {
  LambChunk chunk;
  LambSums sums;
};

// Where element v goes, by the states as they are stored.
template <class Stretch>
__device__ __forceinline__ float direction(const Stretch& stretch, int v, const LambChunk& chunk) {
  const float state[kMostStates] = {stretch.state[0][v], stretch.state[1][v]};
  return Lamb::direction(stretch.param[v], state, chunk.scalars);
}

template <bool kQuantized>
__global__ void __launch_bounds__(kStepThreads, kMixedBlocks<Lamb, 0>)
    lamb_advance_mixed(StepLaunch task, Stored stored, Lamb rule, double* workspace) {
  MixedAdvance* const shared = shared_memory<MixedAdvance>();
  if (threadIdx.x == 0) {
    read_chunk<0, kQuantized, /*kReadsGrad=*/true>(shared->chunk, task, stored, rule);
  }
  __syncthreads();
  if (shared->chunk.skipped) return;
  const LambChunk& chunk = shared->chunk;
  double sums[kSums] = {};
  for_each_stretch<Lamb, 0, kQuantized>(chunk, [&](auto stretch, int first) {
    stretch.template load_all</*kReadsGrad=*/true>(chunk, stored, first);
#pragma unroll
    for (int v = 0; v < kLaneValues; ++v) {
      float state[kMostStates] = {stretch.state[0][v], stretch.state[1][v]};
      Lamb::advance(stretch.grad[v] * chunk.factor, state, chunk.scalars);
      stretch.state[0][v] = state[0];
      stretch.state[1][v] = state[1];
    }
    stretch.store_states(chunk, stored);
#pragma unroll
    for (int v = 0; v < kLaneValues; ++v) {
      if (!stretch.has(v)) continue;
      const double param = stretch.param[v], towards = direction(stretch, v, chunk);
      sums[kParamSquares] += param * param;
      sums[kDirectionSquares] += towards * towards;
    }
  });
  leave_step_size(chunk, sums, shared->sums, workspace);
}

struct MixedApply {
  LambChunk chunk;
  float step_size;  // lr times the trust ratio
};

template <bool kQuantized>
__global__ void __launch_bounds__(kStepThreads, kMixedBlocks<Lamb, 0>)
    lamb_apply_mixed(StepLaunch task, Stored stored, Lamb rule) {
  MixedApply* const shared = shared_memory<MixedApply>();
  if (threadIdx.x == 0) {
    read_chunk<0, kQuantized, /*kReadsGrad=*/false>(shared->chunk, task, stored, rule);
    if (!shared->chunk.skipped) {
      shared->step_size = load(reinterpret_cast<const float*>(shared->chunk.row + kRatio));
    }
  }
  __syncthreads();
  if (shared->chunk.skipped) return;
  const LambChunk chunk = shared->chunk;
  const float step_size = shared->step_size;
  if (threadIdx.x == 0) count_step(chunk.counter, chunk.blocks, task.steps_are_double);
  for_each_stretch<Lamb, 0, kQuantized>(chunk, [&](auto stretch, int first) {
    stretch.template load_all</*kReadsGrad=*/false>(chunk, stored, first);
#pragma unroll
    for (int v = 0; v < kLaneValues; ++v) {
      stretch.param[v] = stretch.param[v] - direction(stretch, v, chunk) * step_size;
    }
    stretch.store_params(chunk, stored);
  });
}

template <bool kQuantized>
void launch_both(const StepLaunch& task, const Lamb& rule, double* workspace, cudaStream_t stream) {
  const dim3 blocks = blocks_of(task);
  const Stored stored = stored_of(task);
  Stored unrounded = stored;
  unrounded.stochastic = false;  // the first launch writes no parameters, and so needs no key
  launch(lamb_advance_mixed<kQuantized>, blocks, kStepThreads, sizeof(MixedAdvance), stream, task,
         unrounded, rule, workspace);
  launch(lamb_apply_mixed<kQuantized>, blocks, kStepThreads, sizeof(MixedApply), stream, task,
         stored, rule);
}

}  // namespace

void mixed_step(const StepLaunch& task, const Lamb& rule, void* workspace, cudaStream_t stream) {
  double* const sums = static_cast<double*>(workspace);
  if (task.storage.state == StateType::kInt8) {
    launch_both<true>(task, rule, sums, stream);
  } else {
    launch_both<false>(task, rule, sums, stream);
  }
}

}  // namespace effkern::cuda
