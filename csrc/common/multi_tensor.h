// The table by which one launch updates any number of tensors.
#pragma once

#include <cstdint>

namespace effkern {

// One row of int64 per tensor. Addresses are those of elements of the tensors' dtype.
// effkern/optim/plan.py builds the table; every backend reads it.
enum TableColumn : int64_t {
  kNumel = 0,
  kParam = 1,
  kGrad = 2,    // filled in at each step
  kState0 = 3,  // Adam: exp_avg
  kState1 = 4,  // Adam: exp_avg_sq
  kState2 = 5,  // Adam with amsgrad: max_exp_avg_sq
  kStep = 6,    // address of the step counter, a CPU float32 or float64
  kSteps = 7,   // GPU only: the number of steps taken when the table was last uploaded
  kTableColumns = 8,
};

// One row of int32 per block of GPU work: which tensor, and which stretch of kChunk elements of it.
enum ChunkColumn : int64_t { kChunkTensor = 0, kChunkIndex = 1, kChunkColumns = 2 };
constexpr int64_t kChunk = 8192;

}  // namespace effkern
