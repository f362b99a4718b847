// One step of a rule that takes one pass: one block per chunk of kChunk elements. What a .cu file
// of a rule instantiates.
//
// Bytes: each element's gradient, parameter and states are read once, parameter and states written
// once. A block also reads its chunk row; of the table the number of elements, the addresses and,
// where the rule counts steps, kSteps; and the numbers on the device that there are (learning rate,
// grad_scale, found_inf). With step counters on the device it reads the counter's address and the
// counter in place of kSteps, and a tensor of several blocks takes a ticket for each; the last
// writes the counter.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/mixed.cuh"

namespace effkern::cuda {
namespace {

// V elements from `offset` on.
template <int V, int kVariant, class Rule, class T>
__device__ __forceinline__ void update(const Chunk<Rule, T>& chunk, int offset) {
  using S = Acc<T>;
  const Pack<T, V> grad = load<V>(chunk.grad + offset);
  Pack<T, V> param = load<V>(chunk.param + offset), states[kMostStates] = {};
#pragma unroll
  for (int s = 0; s < kMostStates; ++s) {
    if (keeps<Rule, kVariant>(s)) states[s] = load<V>(chunk.state[s] + offset);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    S p = widen(param.value[v]), state[kMostStates] = {};
#pragma unroll
    for (int s = 0; s < kMostStates; ++s) {
      if (keeps<Rule, kVariant>(s)) state[s] = widen(states[s].value[v]);
    }
    const S g = static_cast<S>(widen(grad.value[v])) * chunk.factor;
    Rule::template update<kVariant>(p, g, state, chunk.scalars);
    param.value[v] = narrow<T>(p);
#pragma unroll
    for (int s = 0; s < kMostStates; ++s) {
      if (keeps<Rule, kVariant>(s)) states[s].value[v] = narrow<T>(state[s]);
    }
  }
  store(chunk.param + offset, param);
#pragma unroll
  for (int s = 0; s < kMostStates; ++s) {
    if (keeps<Rule, kVariant>(s)) store(chunk.state[s] + offset, states[s]);
  }
}

template <class Rule, int kVariant, class T>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks<Rule, kVariant, T>)
    step_kernel(StepLaunch task, Rule rule) {
  // One thread reads the table and takes the logarithms; the others wait for it, while other blocks
  // load.
  Chunk<Rule, T>* const shared = shared_memory<Chunk<Rule, T>>();
  if (threadIdx.x == 0) read_chunk<kVariant, /*kReadsGrad=*/true>(*shared, task, rule);
  __syncthreads();
  if (shared->skipped) return;
  const Chunk<Rule, T> chunk = *shared;
  if (threadIdx.x == 0) count_step(chunk.counter, chunk.blocks, task.steps_are_double);
  for_each_vector<T>(chunk, [&](auto width, int offset) {
    update<decltype(width)::value, kVariant>(chunk, offset);
  });
}

template <class T, int kVariant = 0, class Rule>
void launch_variant(const StepLaunch& task, const Rule& rule, cudaStream_t stream) {
  if (rule.variant() == kVariant) {
    return launch(step_kernel<Rule, kVariant, T>, blocks_of(task), kStepThreads,
                  sizeof(Chunk<Rule, T>), stream, task, rule);
  }
  if constexpr (kVariant + 1 < Rule::kVariants) launch_variant<T, kVariant + 1>(task, rule, stream);
}

template <class Rule>
void run_step(const StepLaunch& task, const Rule& rule, cudaStream_t stream) {
  if (task.chunk_count == 0) return;
  if (!task.storage.plain()) return launch_mixed(task, rule, stream);
  with_type(task.dtype,
            [&](auto type) { launch_variant<typename decltype(type)::type>(task, rule, stream); });
}

}  // namespace
}  // namespace effkern::cuda
