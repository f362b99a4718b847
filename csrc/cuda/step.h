// One step of an update rule over any number of tensors: one launch, two for LAMB. Formulas:
// math/*.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/multi_tensor.h"
#include "math/rules.h"

namespace effkern::cuda {

// A float32, or a float64, on the device.
struct DeviceNumber {
  const void* address = nullptr;  // null: there is none
  bool is_double = false;
};

struct StepLaunch {
  DType dtype;            // of parameters and gradients, and, with a plain storage, of states
  int64_t* table;         // on the device: a row of kTableColumns per tensor
  const int32_t* chunks;  // on the device: a row of kChunkColumns per block
  int64_t chunk_count;

  // Counters on the CPU: the host has counted, and a tensor's t is its kSteps + elapsed.
  // Counters on the device: t is read from them, and they are increased.
  bool steps_on_device, steps_are_double;
  int64_t elapsed;

  double lr;
  DeviceNumber lr_on_device;  // instead of lr
  DeviceNumber grad_scale;    // gradients are divided by it
  DeviceNumber found_inf;     // nothing happens where it is not 0

  // On the device; the sum of these is that of the squares of all gradients, which are scaled down
  // together to the norm max_norm. Null: they are not.
  const double* squares;
  int64_t squares_count;
  double max_norm;

  Storage storage;
};

#define EFFKERN_DECLARE(Rule, name) \
  void step(const StepLaunch& task, const Rule& rule, cudaStream_t stream);
EFFKERN_ONE_PASS_RULES(EFFKERN_DECLARE)
#undef EFFKERN_DECLARE

// `workspace`: that many bytes on the device, at an address that is a multiple of 16.
int64_t lamb_workspace(const StepLaunch& task);
void step(const StepLaunch& task, const Lamb& rule, void* workspace, cudaStream_t stream);

// Puts the sum of squares of a table's gradients in *result, on the device; of the task it reads
// dtype, table and chunks.
int64_t squares_workspace(const StepLaunch& task);
void squares(const StepLaunch& task, void* workspace, double* result, cudaStream_t stream);

}  // namespace effkern::cuda
