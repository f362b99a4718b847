// The table by which one launch updates any number of tensors.
#pragma once

#include <cstdint>

namespace effkern {

constexpr int kMostStates = 3;

// One row of int64 per tensor. Addresses are those of elements of the tensors' dtype.
// effkern/optim/ plan.py builds the table; every backend reads it.
enum TableColumn : int64_t {
  kNumel = 0,
  kParam = 1,
  kGrad = 2,    // filled in at each step
  kState0 = 3,  // the states, in the order of the rule's kStates; 0 for one that is not kept
  kState1 = 4,
  kState2 = 5,
  kStep = 6,    // address of the step counter, a float32 or float64; 0 where steps are not counted
  kSteps = 7,   // GPU, counters on the CPU: the steps taken when the table was last uploaded
  kTicket = 8,  // GPU: how many of the tensor's blocks have got so far; 0 between launches
  kRatio = 9,   // GPU: what one launch leaves for the next, a number of the accumulation type
  kTableColumns = 10,
};

// One row of int32 per block of GPU work: which tensor, and which stretch of kChunk elements of it.
// A tensor without elements has one block too, which counts its step.
enum ChunkColumn : int64_t { kChunkTensor = 0, kChunkIndex = 1, kChunkColumns = 2 };
constexpr int64_t kChunk = 8192;

}  // namespace effkern
