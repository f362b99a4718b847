// LAMB in two launches, each with one block per chunk of kChunk elements. The first moves the
// states on and sums the squares of parameter and direction; the second goes along the direction,
// computed again from the states.
//
// Bytes: the first launch reads gradient, parameter and both states and writes both states, the
// second reads parameter and states and writes the parameter: 24 and 16 an element of float32. A
// block reads the numbers that step.cuh lists, in each launch (grad_scale and the gradient's
// address in the first alone). In the first it writes its two sums, and a tensor of several blocks
// takes a ticket for each; the last reads the sums of all, adds them in an order that depends on
// their number alone, and writes kRatio, which the second launch reads.
#include "cuda/lamb.cuh"

namespace effkern::cuda {
namespace {

// Blocks a multiprocessor in the first launch: of 2-byte types one less, for the sums.
template <class T>
constexpr int kAdvanceBlocks = kStepBlocks<Lamb, 0, T> - (sizeof(T) == 2);

template <class T>
using LambChunk = Chunk<Lamb, T>;

// Shared memory of the first launch.
template <class T>
struct Advance {
  LambChunk<T> chunk;
  LambSums sums;
};

template <int V, class T>
struct LambPacks {
  Pack<T, V> param, states[2];

  __device__ __forceinline__ LambPacks(const LambChunk<T>& chunk, int offset)
      : param(load<V>(chunk.param + offset)),
        states{load<V>(chunk.state[0] + offset), load<V>(chunk.state[1] + offset)} {}

  // Where element v goes, by the states as they are stored.
  __device__ __forceinline__ Acc<T> direction(int v, const LambChunk<T>& chunk) const {
    const Acc<T> state[kMostStates] = {widen(states[0].value[v]), widen(states[1].value[v])};
    return Lamb::direction(static_cast<Acc<T>>(widen(param.value[v])), state, chunk.scalars);
  }
};

// Moves the states of V elements on and adds to the sums of squares, in float64: a float32 square
// can overflow, and can vanish.
template <int V, class T>
__device__ __forceinline__ void advance(const LambChunk<T>& chunk, int offset,
                                        double (&sums)[kSums]) {
  using S = Acc<T>;
  const Pack<T, V> grad = load<V>(chunk.grad + offset);
  LambPacks<V, T> packs(chunk, offset);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    S state[kMostStates] = {widen(packs.states[0].value[v]), widen(packs.states[1].value[v])};
    Lamb::advance(static_cast<S>(widen(grad.value[v])) * chunk.factor, state, chunk.scalars);
    packs.states[0].value[v] = narrow<T>(state[0]);
    packs.states[1].value[v] = narrow<T>(state[1]);
    const double param = widen(packs.param.value[v]), direction = packs.direction(v, chunk);
    sums[kParamSquares] += param * param;
    sums[kDirectionSquares] += direction * direction;
  }
  store(chunk.state[0] + offset, packs.states[0]);
  store(chunk.state[1] + offset, packs.states[1]);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, kAdvanceBlocks<T>)
    lamb_advance(StepLaunch task, Lamb rule, double* workspace) {
  Advance<T>* const shared = shared_memory<Advance<T>>();
  if (threadIdx.x == 0) read_chunk<0, /*kReadsGrad=*/true>(shared->chunk, task, rule);
  __syncthreads();
  if (shared->chunk.skipped) return;
  const LambChunk<T>& chunk = shared->chunk;  // a copy would take registers from the sums
  double sums[kSums] = {};
  for_each_vector<T>(
      chunk, [&](auto width, int offset) { advance<decltype(width)::value>(chunk, offset, sums); });

  leave_step_size(chunk, sums, shared->sums, workspace);
}

template <class T>
struct Apply {
  LambChunk<T> chunk;
  Acc<T> step_size;  // lr times the trust ratio
};

template <int V, class T>
__device__ __forceinline__ void apply(const LambChunk<T>& chunk, int offset, Acc<T> step_size) {
  LambPacks<V, T> packs(chunk, offset);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Acc<T> param = widen(packs.param.value[v]);
    packs.param.value[v] = narrow<T>(param - packs.direction(v, chunk) * step_size);
  }
  store(chunk.param + offset, packs.param);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks<Lamb, 0, T>)
    lamb_apply(StepLaunch task, Lamb rule) {
  Apply<T>* const shared = shared_memory<Apply<T>>();
  if (threadIdx.x == 0) {
    read_chunk<0, /*kReadsGrad=*/false>(shared->chunk, task, rule);
    if (!shared->chunk.skipped) {
      shared->step_size = load(reinterpret_cast<const Acc<T>*>(shared->chunk.row + kRatio));
    }
  }
  __syncthreads();
  if (shared->chunk.skipped) return;
  const LambChunk<T> chunk = shared->chunk;
  const Acc<T> step_size = shared->step_size;
  if (threadIdx.x == 0) count_step(chunk.counter, chunk.blocks, task.steps_are_double);
  for_each_vector<T>(chunk, [&](auto width, int offset) {
    apply<decltype(width)::value>(chunk, offset, step_size);
  });
}

}  // namespace

int64_t lamb_workspace(const StepLaunch& task) {
  return task.chunk_count * kSums * static_cast<int64_t>(sizeof(double));
}

void step(const StepLaunch& task, const Lamb& rule, void* workspace, cudaStream_t stream) {
  if (task.chunk_count == 0) return;
  if (!task.storage.plain()) return mixed_step(task, rule, workspace, stream);
  const dim3 blocks = blocks_of(task);
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(lamb_advance<T>, blocks, kStepThreads, sizeof(Advance<T>), stream, task, rule,
           static_cast<double*>(workspace));
    launch(lamb_apply<T>, blocks, kStepThreads, sizeof(Apply<T>), stream, task, rule);
  });
}

}  // namespace effkern::cuda
