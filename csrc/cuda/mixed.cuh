// One step where not all tensors have the parameters' dtype: states in float32, bfloat16 or 8 bits,
// float32 masters, stochastic rounding. One block per chunk of kChunk elements, a warp for each
// stretch of 256 of them; computed in float32. Which dtypes there are is the same for all threads.
//
// Bytes: as step.cuh, each array in its own dtype, and four more each way for a scale of 256
// values. With masters the parameters are written and not read. A block reads the addresses of
// masters and scales, and of stochastic rounding the key and the number of the step.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/quantized.cuh"

namespace effkern::cuda {
namespace {

// Blocks a multiprocessor: a thread has eight elements of each array at once.
template <class Rule, int kVariant>
constexpr int kMixedBlocks = kKeptStates<Rule, kVariant> == 7 ? 2 : 3;

// Bit s: whether values of state s may be negative.
template <class Rule>
constexpr int kSignedStates =
    Rule::is_signed(0) | Rule::is_signed(1) << 1 | Rule::is_signed(2) << 2;

// What a launch is told of storage. `source` is the dtype of where parameters are computed: of
// their masters, or their own; `state` is unused for states in 8 bits.
struct Stored {
  DType param, source, state;
  bool masters, stochastic;
};

inline Stored stored_of(const StepLaunch& task) {
  const Storage& storage = task.storage;
  if (task.dtype == DType::kFloat64) {
    throw std::runtime_error("effkern: float64 is not stored in another way");
  }
  const DType state = storage.state == StateType::kFloat32    ? DType::kFloat32
                      : storage.state == StateType::kBFloat16 ? DType::kBFloat16
                                                              : task.dtype;
  return {task.dtype, storage.masters ? DType::kFloat32 : task.dtype, state, storage.masters,
          storage.stochastic};
}

// Filled in by one thread of a block, in shared memory, for all.
template <class Rule>
struct MixedChunk : Work<Rule, float> {
  char *source, *param, *state[kMostStates];
  const char* grad;
  float* scales[kMostStates];
  bool aligned;            // whole stretches are
  uint32_t stream, first;  // of stochastic rounding; the lower bits of the first element's index
};

template <int kVariant, bool kQuantized, bool kReadsGrad, class Rule>
__device__ void read_chunk(MixedChunk<Rule>& chunk, const StepLaunch& task, const Stored& stored,
                           const Rule& rule) {
  const double t =
      read_work<kReadsGrad>(chunk, task, rule, Rule::kCountsSteps || stored.stochastic);
  if (chunk.skipped) return;
  const int64_t* const row = chunk.row;
  const int64_t start = chunk.index * kChunk;
  int64_t addresses = 0;
  const auto address = [&](int64_t column, int bytes) {
    const int64_t result = load(row + column) + start * bytes;
    addresses |= bytes == 1 ? result * 2 : result;  // those of 8 bits are taken 8 bytes at a time
    return reinterpret_cast<char*>(result);
  };
  chunk.source = chunk.param = address(kParam, bytes_of(stored.param));
  if (stored.masters) chunk.source = address(kMaster, bytes_of(stored.source));
  if constexpr (kReadsGrad) chunk.grad = address(kGrad, bytes_of(stored.param));
#pragma unroll
  for (int s = 0; s < kMostStates; ++s) {
    if (!keeps<Rule, kVariant>(s)) continue;
    chunk.state[s] = address(kState0 + s, kQuantized ? 1 : bytes_of(stored.state));
    if constexpr (kQuantized) {
      chunk.scales[s] = reinterpret_cast<float*>(load(row + kScale0 + s)) + start / kStretch;
    }
  }
  chunk.aligned = addresses % 16 == 0;
  if (stored.stochastic) {
    chunk.stream =
        rounding_stream(rounding_seed(load(row + kKey), t), static_cast<uint32_t>(start >> 32));
    chunk.first = static_cast<uint32_t>(start);
  }
}

// What a lane has of a stretch of all arrays.
template <class Rule, int kVariant, bool kQuantized, bool kWhole>
class Stretch {
 public:
  Values param, grad, state[kMostStates];

  // Elements of the chunk from `first` on.
  template <bool kReadsGrad>
  __device__ __forceinline__ void load_all(const MixedChunk<Rule>& chunk, const Stored& stored,
                                           int first) {
    first_ = first;
    count_ = chunk.count - first;
    const Words params = load_words<kWhole>(at(chunk.source, stored.source), stored.source, count_);
    Words grads = {}, states[kMostStates] = {};
    float scales[kMostStates] = {};  // one lane has them
    if constexpr (kReadsGrad) {
      grads = load_words<kWhole>(at(chunk.grad, stored.param), stored.param, count_);
    }
#pragma unroll
    for (int s = 0; s < kMostStates; ++s) {
      if (!keeps<Rule, kVariant>(s)) continue;
      states[s] = load_state(chunk, stored, s);
      if (kQuantized && lane_index() == 0) scales[s] = load(chunk.scales[s] + first_ / kStretch);
    }
    widen(params, stored.source, param);
    if constexpr (kReadsGrad) widen(grads, stored.param, grad);
#pragma unroll
    for (int s = 0; s < kMostStates; ++s) {
      if (!keeps<Rule, kVariant>(s)) continue;
      if constexpr (kQuantized) {
        dequantize(s, states[s], __shfl_sync(0xffffffffu, scales[s], 0));
      } else {
        widen(states[s], stored.state, state[s]);
      }
    }
  }

  __device__ __forceinline__ void store_params(const MixedChunk<Rule>& chunk,
                                               const Stored& stored) const {
    if (stored.masters) {
      store_words<kWhole, 4>(at(chunk.source, DType::kFloat32), count_, narrow_to<float>(param));
    }
    const Words words = stored.stochastic
                            ? narrow_stochastically<kWhole>(
                                  param, chunk.stream, chunk.first + static_cast<uint32_t>(first_))
                            : narrow(param, stored.param);
    store_words<kWhole>(at(chunk.param, stored.param), stored.param, count_, words);
  }

  // Leaves states as they will be read.
  __device__ __forceinline__ void store_states(const MixedChunk<Rule>& chunk,
                                               const Stored& stored) {
#pragma unroll
    for (int s = 0; s < kMostStates; ++s) {
      if (!keeps<Rule, kVariant>(s)) continue;
      if constexpr (kQuantized) {
        const float scale = largest_magnitude<kWhole>(state[s], count_);
        const Words codes =
            is_signed(s) ? quantize<true>(state[s], scale) : quantize<false>(state[s], scale);
        store_words<kWhole, 1>(chunk.state[s] + first_, count_, codes);
        if (lane_index() == 0) store(chunk.scales[s] + first_ / kStretch, scale);
        dequantize(s, codes, scale);
      } else {
        const Words words = narrow(state[s], stored.state);
        store_words<kWhole>(at(chunk.state[s], stored.state), stored.state, count_, words);
        widen(words, stored.state, state[s]);
      }
    }
  }

  // Whether number v of the lane is one of the tensor's.
  __device__ __forceinline__ bool has(int v) const {
    return kWhole || place_of<kWhole>(v) < count_;
  }

 private:
  int first_, count_;

  static __device__ __forceinline__ bool is_signed(int s) {
    return (kSignedStates<Rule> >> s & 1) != 0;
  }
  template <class Byte>
  __device__ __forceinline__ Byte* at(Byte* array, DType dtype) const {
    return array + first_ * bytes_of(dtype);
  }

  __device__ __forceinline__ Words load_state(const MixedChunk<Rule>& chunk, const Stored& stored,
                                              int s) const {
    if constexpr (kQuantized) {
      return load_words<kWhole, 1>(chunk.state[s] + first_, count_);
    } else {
      return load_words<kWhole>(at(chunk.state[s], stored.state), stored.state, count_);
    }
  }
  __device__ __forceinline__ void dequantize(int s, const Words& codes, float scale) {
    if (is_signed(s)) return cuda::dequantize<true>(codes, scale, state[s]);
    cuda::dequantize<false>(codes, scale, state[s]);
  }
};

// Calls body(Stretch, first) for the stretches of this thread's warp: from element `first` of the
// chunk on.
template <class Rule, int kVariant, bool kQuantized, class Body>
__device__ __forceinline__ void for_each_stretch(const MixedChunk<Rule>& chunk, const Body& body) {
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) / kWarp * kStretch; first < chunk.count;
       first += kStepThreads * kLaneValues) {
    if (chunk.aligned && chunk.count - first >= kStretch) {
      body(Stretch<Rule, kVariant, kQuantized, /*kWhole=*/true>(), first);
    } else {
      body(Stretch<Rule, kVariant, kQuantized, /*kWhole=*/false>(), first);
    }
  }
}

template <class Rule, int kVariant, bool kQuantized>
__global__ void __launch_bounds__(kStepThreads, kMixedBlocks<Rule, kVariant>)
    mixed_kernel(StepLaunch task, Stored stored, Rule rule) {
  MixedChunk<Rule>* const shared = shared_memory<MixedChunk<Rule>>();
  if (threadIdx.x == 0) {
    read_chunk<kVariant, kQuantized, /*kReadsGrad=*/true>(*shared, task, stored, rule);
  }
  __syncthreads();
  if (shared->skipped) return;
  const MixedChunk<Rule> chunk = *shared;
  if (threadIdx.x == 0) count_step(chunk.counter, chunk.blocks, task.steps_are_double);
  for_each_stretch<Rule, kVariant, kQuantized>(chunk, [&](auto stretch, int first) {
    stretch.template load_all</*kReadsGrad=*/true>(chunk, stored, first);
#pragma unroll
    for (int v = 0; v < kLaneValues; ++v) {
      float state[kMostStates] = {};
#pragma unroll
      for (int s = 0; s < kMostStates; ++s) {
        if (keeps<Rule, kVariant>(s)) state[s] = stretch.state[s][v];
      }
      const float grad = stretch.grad[v] * chunk.factor;
      Rule::template update<kVariant>(stretch.param[v], grad, state, chunk.scalars);
#pragma unroll
      for (int s = 0; s < kMostStates; ++s) {
        if (keeps<Rule, kVariant>(s)) stretch.state[s][v] = state[s];
      }
    }
    stretch.store_params(chunk, stored);
    stretch.store_states(chunk, stored);
  });
}

template <int kVariant = 0, class Rule>
void launch_mixed(const StepLaunch& task, const Rule& rule, cudaStream_t stream) {
  if (rule.variant() == kVariant) {
    auto* kernel = mixed_kernel<Rule, kVariant, false>;
    if constexpr (kKeptStates<Rule, kVariant> != 0) {
      if (task.storage.state == StateType::kInt8) kernel = mixed_kernel<Rule, kVariant, true>;
    }
    return launch(kernel, blocks_of(task), kStepThreads, sizeof(MixedChunk<Rule>), stream, task,
                  stored_of(task), rule);
  }
  if constexpr (kVariant + 1 < Rule::kVariants) {
    launch_mixed<kVariant + 1>(task, rule, stream);
  }
}

}  // namespace
}  // namespace effkern::cuda
