// What a block of a multi-tensor step knows of its work, for any update rule: its chunk, the
// scalars of its tensor, and how the tensor's step is counted on the device.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/step.h"

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

// Filled in by one thread of a block, in shared memory, for all.
template <class Rule, class T>
struct Chunk {
  T *param, *state[kMostStates];
  const T* grad;
  int64_t* row;   // of the table
  int64_t index;  // of this chunk in its tensor
  int count;      // of elements
  int vectors;    // of 16 bytes among them; 0 where an address is not a multiple of 16
  bool skipped;   // nothing else stands here, and nothing is to be done
  Acc<T> factor;  // gradients are multiplied by it
  double lr;
  typename Rule::template Scalars<Acc<T>> scalars;
  Counter counter;
  Blocks blocks;
};

__device__ __forceinline__ double value_of(DeviceNumber number) {
  return number.is_double ? load(static_cast<const double*>(number.address))
                          : static_cast<double>(load(static_cast<const float*>(number.address)));
}

// The number of the step that the formula is for; fills in `counter`.
template <class Rule>
__device__ double read_step(Counter& counter, const int64_t* row, const StepLaunch& task) {
  counter.address = nullptr;
  if (!task.steps_on_device) {
    return Rule::kCountsSteps ? static_cast<double>(load(row + kSteps) + task.elapsed) : 1.0;
  }
  counter.address = reinterpret_cast<void*>(load(row + kStep));
  if (counter.address == nullptr) return 1.0;
  counter.next = value_of({counter.address, task.steps_are_double}) + 1.0;
  return counter.next;
}

// `kReadsGrad`: whether the pass over the chunk reads gradients.
template <int kVariant, bool kReadsGrad, class Rule, class T>
__device__ void read_chunk(Chunk<Rule, T>& chunk, const StepLaunch& task, const Rule& rule) {
  chunk.skipped = task.found_inf.address != nullptr && value_of(task.found_inf) != 0.0;
  if (chunk.skipped) return;

  const int32_t* const chunk_row = task.chunks + block_index() * kChunkColumns;
  int64_t* const row = task.table + load(chunk_row + kChunkTensor) * int64_t{kTableColumns};
  chunk.row = row;
  chunk.index = load(chunk_row + kChunkIndex);
  const double t = read_step<Rule>(chunk.counter, row, task);
  chunk.lr = task.lr_on_device.address != nullptr ? value_of(task.lr_on_device) : task.lr;
  chunk.scalars = rule.template scalars<Acc<T>>(chunk.lr, t);
  chunk.factor = kReadsGrad && task.grad_scale.address != nullptr
                     ? static_cast<Acc<T>>(1.0 / value_of(task.grad_scale))
                     : Acc<T>(1);

  const int64_t numel = load(row + kNumel), start = chunk.index * kChunk, left = numel - start;
  chunk.count = static_cast<int>(left < kChunk ? left : kChunk);
  chunk.blocks.ticket = reinterpret_cast<unsigned*>(row + kTicket);
  chunk.blocks.count = numel > kChunk ? (numel + kChunk - 1) / kChunk : 1;
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
template <class Rule, class T, class Body>
__device__ __forceinline__ void for_each_vector(const Chunk<Rule, T>& chunk, const Body& body) {
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
