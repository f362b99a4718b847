// What a block of a multi-tensor step knows of its work, for any update rule: its chunk, the
// scalars of its tensor, and how the tensor's step is counted on the device.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/step.h"
#include "math/clip.h"

namespace effkern::cuda {

constexpr int kStepThreads = 256;

// Bit s: whether a variant of a rule keeps state s.
template <class Rule, int kVariant>
constexpr int kKeptStates = Rule::has_state(kVariant, 0) | Rule::has_state(kVariant, 1) << 1 |
                            Rule::has_state(kVariant, 2) << 2;

template <class Rule, int kVariant>
__device__ __forceinline__ constexpr bool keeps(int state) {
  return (kKeptStates<Rule, kVariant> >> state & 1) != 0;
}

inline dim3 blocks_of(const StepLaunch& task) {
  if (task.chunk_count > kMostBlocks) throw std::runtime_error("effkern: too many chunks");
  return dim3(static_cast<unsigned>(task.chunk_count));
}

// Blocks a multiprocessor, which bounds the registers of a thread: 64 with four. With three states
// of a 2-byte type, of which a thread has twice as many elements at once, it is three; with float64
// two.
template <class Rule, int kVariant, class T>
constexpr int kStepBlocks =
    sizeof(T) == 8 ? 2 : 4 - (sizeof(T) == 2 && kKeptStates<Rule, kVariant> == 7);

// A step counter on the device.
struct Counter {
  void* address;  // null: this step is not counted here
  double next;    // what it will be
};

// The blocks of one tensor, and who of them comes last.
struct Blocks {
  unsigned* ticket;  // the tensor's kTicket
  int64_t count;
};

// What a block knows of its work, however the tensors are stored; S is the accumulation type.
template <class Rule, class S>
struct Work {
  int64_t* row;   // of the table
  int64_t index;  // of this chunk in its tensor
  int count;      // of elements
  bool skipped;   // nothing else stands here, and nothing is to be done
  S factor;       // gradients are multiplied by it
  double lr;
  typename Rule::template Scalars<S> scalars;
  Counter counter;
  Blocks blocks;
};

// Filled in by one thread of a block, in shared memory, for all.
template <class Rule, class T>
struct Chunk : Work<Rule, Acc<T>> {
  T *param, *state[kMostStates];
  const T* grad;
  int vectors;  // of 16 bytes among the elements; 0 where an address is not a multiple of 16
};

__device__ __forceinline__ double value_of(DeviceNumber number) {
  return number.is_double ? load(static_cast<const double*>(number.address))
                          : static_cast<double>(load(static_cast<const float*>(number.address)));
}

// The number of the step, 1 where neither the counter nor its reader knows it; fills in `counter`.
__device__ __forceinline__ double read_step(Counter& counter, const int64_t* row,
                                            const StepLaunch& task, bool reads_step) {
  counter.address = nullptr;
  if (!task.steps_on_device) {
    return reads_step ? static_cast<double>(load(row + kSteps) + task.elapsed) : 1.0;
  }
  counter.address = reinterpret_cast<void*>(load(row + kStep));
  if (counter.address == nullptr) return 1.0;
  counter.next = value_of({counter.address, task.steps_are_double}) + 1.0;
  return counter.next;
}

// What gradients are multiplied by.
__device__ __forceinline__ double read_factor(const StepLaunch& task) {
  const double scale = task.grad_scale.address != nullptr ? value_of(task.grad_scale) : 1.0;
  if (task.squares == nullptr) return 1.0 / scale;
  double sum = 0;
#pragma unroll 1  // several at a time would take registers from the loop over elements
  for (int64_t i = 0; i < task.squares_count; ++i) sum += load(task.squares + i);
  return clipping_factor(sum, scale, task.max_norm);
}

// Returns the number of the step. `kReadsGrad`: whether the pass over the chunk reads gradients;
// `reads_step`: whether it needs that number.
template <bool kReadsGrad, class Rule, class S>
__device__ __forceinline__ double read_work(Work<Rule, S>& work, const StepLaunch& task,
                                            const Rule& rule, bool reads_step) {
  work.skipped = task.found_inf.address != nullptr && value_of(task.found_inf) != 0.0;
  if (work.skipped) return 0.0;

  const int32_t* const chunk_row = task.chunks + block_index() * kChunkColumns;
  int64_t* const row = task.table + load(chunk_row + kChunkTensor) * int64_t{kTableColumns};
  work.row = row;
  work.index = load(chunk_row + kChunkIndex);
  const double t = read_step(work.counter, row, task, reads_step);
  work.lr = task.lr_on_device.address != nullptr ? value_of(task.lr_on_device) : task.lr;
  work.scalars = rule.template scalars<S>(work.lr, t);
  if constexpr (kReadsGrad) work.factor = static_cast<S>(read_factor(task));
  const int64_t numel = load(row + kNumel), left = numel - work.index * kChunk;
  work.count = static_cast<int>(left < kChunk ? left : kChunk);
  work.blocks.ticket = reinterpret_cast<unsigned*>(row + kTicket);
  work.blocks.count = numel > kChunk ? (numel + kChunk - 1) / kChunk : 1;
  return t;
}

template <int kVariant, bool kReadsGrad, class Rule, class T>
__device__ void read_chunk(Chunk<Rule, T>& chunk, const StepLaunch& task, const Rule& rule) {
  read_work<kReadsGrad>(chunk, task, rule, Rule::kCountsSteps);
  if (chunk.skipped) return;
  const int64_t* const row = chunk.row;
  const int64_t start = chunk.index * kChunk;
  int64_t addresses = 0;
  const auto address = [&](int64_t column) {
    const int64_t result = load(row + column) + start * static_cast<int64_t>(sizeof(T));
    addresses |= result;
    return reinterpret_cast<T*>(result);
  };
  chunk.param = address(kParam);
  if constexpr (kReadsGrad) chunk.grad = address(kGrad);
#pragma unroll
  for (int s = 0; s < kMostStates; ++s) {
    if (keeps<Rule, kVariant>(s)) chunk.state[s] = address(kState0 + s);
  }
  chunk.vectors = addresses % 16 == 0 ? chunk.count / kWidth<T> : 0;
}

// Calls body(integral_constant<int, V>, offset) for this thread's share of a chunk: V elements from
// `offset` on.
template <class T, class AnyChunk, class Body>
__device__ __forceinline__ void for_each_vector(const AnyChunk& chunk, const Body& body) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < chunk.vectors; i += kStepThreads) {
    body(std::integral_constant<int, kWidth<T>>{}, i * kWidth<T>);
  }
  for (int i = chunk.vectors * kWidth<T> + thread; i < chunk.count; i += kStepThreads) {
    body(std::integral_constant<int, 1>{}, i);
  }
}

// Whether all other blocks of the tensor have been here. What they wrote before that is then seen,
// and they will not see what is written after it.
__device__ __forceinline__ bool is_last(const Blocks& blocks) {
  if (blocks.count == 1) return true;
  const unsigned last = static_cast<unsigned>(blocks.count - 1);
  __threadfence();
  const bool result = take_ticket(blocks.ticket, last) == last;
  __threadfence();
  return result;
}

// For one thread of a block that has read the counter: the last block to do so increases it.
__device__ __forceinline__ void count_step(const Counter& counter, const Blocks& blocks,
                                           bool is_double) {
  if (counter.address == nullptr || !is_last(blocks)) return;
  if (is_double) {
    store(static_cast<double*>(counter.address), counter.next);
  } else {
    store(static_cast<float*>(counter.address), static_cast<float>(counter.next));
  }
}

}  // namespace effkern::cuda
