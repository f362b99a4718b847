// `_adam_` and `_adam_planned_` for CUDA tensors. Declared in effkern/ops.
#include "cuda/adam.h"
#include "torch/cuda_device.h"
#include "torch/multi_tensor.h"

namespace effkern {
namespace {

// Host memory is pageable: CUDA has taken its copy of it when this returns, so it may change at
// once.
void upload(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream);
  STD_TORCH_CHECK(error == cudaSuccess,
                  "the table of tensors could not be uploaded: ", cudaGetErrorString(error));
}

Tensor uploaded(const void* from, size_t bytes, Device device, cudaStream_t stream) {
  Tensor copy = empty_bytes(static_cast<int64_t>(bytes), device);
  upload(copy.mutable_data_ptr(), from, bytes, stream);
  return copy;
}

std::vector<int32_t> chunks_of(const AdamTable& table) {
  std::vector<int32_t> chunks;
  for (int64_t tensor = 0; tensor < table.tensors(); ++tensor) {
    const int64_t numel = table.rows[tensor * kTableColumns + kNumel];
    for (int64_t chunk = 0; chunk * kChunk < numel; ++chunk) {
      chunks.push_back(static_cast<int32_t>(tensor));
      chunks.push_back(static_cast<int32_t>(chunk));
    }
  }
  return chunks;
}

void adam_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
           const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
           const std::vector<Tensor>& max_exp_avg_sqs, const std::vector<Tensor>& steps, double lr,
           double beta1, double beta2, double eps, double weight_decay, bool decoupled,
           bool amsgrad, bool maximize) {
  AdamTable table =
      adam_table({params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps}, amsgrad);
  for (int64_t i = 0; i < table.tensors(); ++i) {
    int64_t* const row = table.rows.data() + i * kTableColumns;
    row[kSteps] = static_cast<int64_t>(increase_step(row, table.steps_are_double));
  }
  const std::vector<int32_t> chunks = chunks_of(table);
  if (chunks.empty()) return;
  const CudaDevice current(table.device);
  const cudaStream_t stream = current.stream();
  const Tensor device_table =
      uploaded(table.rows.data(), table.rows.size() * sizeof(int64_t), table.device, stream);
  const Tensor device_chunks =
      uploaded(chunks.data(), chunks.size() * sizeof(int32_t), table.device, stream);
  cuda::adam({table.dtype, static_cast<const int64_t*>(device_table.const_data_ptr()),
              static_cast<const int32_t*>(device_chunks.const_data_ptr()),
              static_cast<int64_t>(chunks.size()) / kChunkColumns, /*elapsed=*/0,
              AdamOptions{lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize}},
             stream);
}

// Increases every step counter. Returns the steps elapsed since the table was last uploaded, or
// nothing where the tensors do not agree on them.
std::optional<int64_t> increase_steps(const int64_t* table, int64_t tensors, bool are_double) {
  std::optional<int64_t> common;
  bool agree = true;
  for (int64_t i = 0; i < tensors; ++i) {
    const int64_t* const row = table + i * kTableColumns;
    const int64_t elapsed = static_cast<int64_t>(increase_step(row, are_double)) - row[kSteps];
    agree = agree && elapsed == common.value_or(elapsed);
    common = elapsed;
  }
  return agree ? common : std::nullopt;
}

void adam_planned_(const Tensor& table, const Tensor& device_table, const Tensor& chunks,
                   const Tensor& layouts, bool moved, double lr, double beta1, double beta2,
                   double eps, double weight_decay, bool decoupled, bool amsgrad, bool maximize) {
  int64_t* const rows = planned_table(table);
  const int64_t tensors = table.size(0);
  const PlanHeader plan(layouts);
  const Device device = device_of(device_table);
  STD_TORCH_CHECK(device_table.is_contiguous() && device_table.numel() == table.numel() &&
                      device_table.scalar_type() == ScalarType::Long,
                  "device_table must be a copy of table on the parameters' device");
  STD_TORCH_CHECK(chunks.is_contiguous() && chunks.scalar_type() == ScalarType::Int &&
                      device_of(chunks) == device && chunks.dim() == 2 &&
                      chunks.size(1) == kChunkColumns,
                  "chunks must be a contiguous int32 tensor of ", int64_t{kChunkColumns},
                  " columns on the device of device_table");
  std::optional<int64_t> elapsed = increase_steps(rows, tensors, plan.steps_are_double());
  if (chunks.numel() == 0) return;
  const CudaDevice current(device);
  const cudaStream_t stream = current.stream();
  if (moved || !elapsed) {
    for (int64_t i = 0; i < tensors; ++i) {
      int64_t* const row = rows + i * kTableColumns;
      row[kSteps] = static_cast<int64_t>(step_of(row, plan.steps_are_double()));
    }
    elapsed = 0;
    upload(device_table.mutable_data_ptr(), rows, tensors * kTableColumns * sizeof(int64_t),
           stream);
  }
  cuda::adam({plan.dtype(), static_cast<const int64_t*>(device_table.const_data_ptr()),
              static_cast<const int32_t*>(chunks.const_data_ptr()), chunks.size(0), *elapsed,
              AdamOptions{lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize}},
             stream);
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, EFFKERN_CUDA_KEY, m) {
  m.impl("_adam_" EFFKERN_CUDA_OVERLOAD, TORCH_BOX(&effkern::adam_));
  m.impl("_adam_planned_" EFFKERN_CUDA_OVERLOAD, TORCH_BOX(&effkern::adam_planned_));
}
