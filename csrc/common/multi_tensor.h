// The table by which one launch updates any number of tensors.
#pragma once

#include <cstdint>

namespace effkern {

constexpr int kMostStates = 3;

// How a step's tensors are stored where not all of them have the parameters' dtype.
enum class StateType : int32_t {
  kAsParam = 0,
  kFloat32 = 1,
  kBFloat16 = 2,
  kInt8 = 3,  // see math/quantize.h
};
struct Storage {
  StateType state = StateType::kAsParam;
  bool masters = false;     // parameters are computed in kMaster and rounded from there
  bool stochastic = false;  // bfloat16 parameters are rounded stochastically
  bool plain() const { return state == StateType::kAsParam && !masters && !stochastic; }
};

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
  kMaster =
      10,  // address of the float32 master of a bfloat16 or float16 parameter; 0: there is none
  kScale0 = 11,  // of states in 8 bits: the float32 scales of their blocks
  kScale1 = 12,
  kScale2 = 13,
  kKey = 14,           // of stochastic rounding, see math/rounding.h
  kTableColumns = 16,  // a row begins on a cache line, and what every step reads is in that line
};

// One row of int32 per block of GPU work: which tensor, and which stretch of kChunk elements of it.
// A tensor without elements has one block too, which counts its step.
enum ChunkColumn : int64_t { kChunkTensor = 0, kChunkIndex = 1, kChunkColumns = 2 };
constexpr int64_t kChunk = 8192;

}  // namespace effkern
