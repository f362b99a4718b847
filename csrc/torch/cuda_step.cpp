// The update rules' ops for CUDA tensors: one step from lists of tensors, or by plan.
#include "cuda/step.h"
#include "torch/cuda_device.h"
#include "torch/multi_tensor.h"

namespace effkern {
namespace {

// Host memory is pageable: CUDA has taken its copy of it when this returns, so it may change at
// once.
void upload(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream);
  STD_TORCH_CHECK(error == cudaSuccess,
                  "the table of tensors could not be uploaded: ", cudaGetErrorString(error));
}

template <class T>
Tensor uploaded(const std::vector<T>& from, Device device, cudaStream_t stream) {
  Tensor copy = empty_bytes(static_cast<int64_t>(from.size() * sizeof(T)), device);
  upload(copy.mutable_data_ptr(), from.data(), from.size() * sizeof(T), stream);
  return copy;
}

// ---- what the launch is told of numbers ----

// On the parameters' device; null where there is none.
cuda::DeviceNumber device_number(const std::optional<Tensor>& tensor, const char* name,
                                 Device device) {
  if (!tensor) return {};
  STD_TORCH_CHECK(device_of(*tensor) == device, name,
                  " is on another device; it must be on the parameters' device");
  return {tensor->const_data_ptr(), tensor->scalar_type() == ScalarType::Double};
}

// All of a launch but its table and chunks.
cuda::StepLaunch launch_of(const StepKeywords& keywords, DType dtype, const Storage& storage,
                           Device device, Steps steps) {
  cuda::StepLaunch task{};
  task.dtype = dtype;
  task.storage = storage;
  task.steps_on_device = steps.on_device;
  task.steps_are_double = steps.are_double;
  task.lr = keywords.lr;
  if (keywords.lr_tensor && keywords.lr_tensor->is_cpu() &&
      device_of(*keywords.lr_tensor) != device) {
    task.lr = number_in(*keywords.lr_tensor);
  } else {
    task.lr_on_device = device_number(keywords.lr_tensor, "lr_tensor", device);
  }
  task.grad_scale = device_number(keywords.grad_scale, "grad_scale", device);
  task.found_inf = device_number(keywords.found_inf, "found_inf", device);
  if (keywords.squares) {
    check_squares(*keywords.squares);
    STD_TORCH_CHECK(device_of(*keywords.squares) == device,
                    "squares is on another device; it must be on the parameters' device");
    task.squares = static_cast<const double*>(keywords.squares->const_data_ptr());
    task.squares_count = keywords.squares->numel();
    task.max_norm = keywords.max_norm;
  }
  return task;
}

// ---- step counters on the CPU ----

bool host_counts(const int64_t* rows, int64_t tensors, Steps steps) {
  if (steps.on_device) return false;
  for (int64_t i = 0; i < tensors; ++i) {
    if (rows[i * kTableColumns + kStep]) return true;
  }
  return false;
}

// Where the host counts, it must know before the launch whether the step is taken: it reads
// found_inf in place of the kernel.
bool host_finds_inf(StepKeywords& keywords) {
  if (!keywords.found_inf) return false;
  STD_TORCH_CHECK(keywords.found_inf->is_cpu(),
                  "found_inf is not on the CPU, where step counters are; they must be on the "
                  "parameters' device, both of them");
  const bool found = number_in(*keywords.found_inf) != 0.0;
  keywords.found_inf.reset();
  return found;
}

// The number of the step that the formula is for.
int64_t formula_step(const int64_t* row, Steps steps) {
  return row[kStep] ? static_cast<int64_t>(step_of(row, steps)) : 1;
}

// Increases every counter. Returns how many steps have been taken since kSteps was set, or nothing
// where the tensors do not agree on it.
std::optional<int64_t> count_steps(const int64_t* rows, int64_t tensors, Steps steps) {
  std::optional<int64_t> common;
  bool agree = true;
  for (int64_t i = 0; i < tensors; ++i) {
    const int64_t* const row = rows + i * kTableColumns;
    increase_step(row, steps);
    const int64_t elapsed = formula_step(row, steps) - row[kSteps];
    agree = agree && elapsed == common.value_or(elapsed);
    common = elapsed;
  }
  return agree ? common : std::nullopt;
}

void set_steps(int64_t* rows, int64_t tensors, Steps steps) {
  for (int64_t i = 0; i < tensors; ++i) {
    int64_t* const row = rows + i * kTableColumns;
    row[kSteps] = formula_step(row, steps);
  }
}

// ---- tables on the device ----

// As effkern/optim/plan.py makes them.
std::vector<int32_t> chunks_of(const StepTable& table) {
  std::vector<int32_t> chunks;
  for (int64_t tensor = 0; tensor < table.tensors(); ++tensor) {
    const int64_t numel = table.rows[tensor * kTableColumns + kNumel];
    int64_t chunk = 0;
    do {
      chunks.push_back(static_cast<int32_t>(tensor));
      chunks.push_back(static_cast<int32_t>(chunk));
    } while (++chunk * kChunk < numel);
  }
  return chunks;
}

// A table that serves one call, on the device for as long as this lives.
class UploadedTable {
 public:
  UploadedTable(const StepTable& table, cudaStream_t stream)
      : UploadedTable(table, chunks_of(table), stream) {}

  void put_in(cuda::StepLaunch& task) const {
    task.table = static_cast<int64_t*>(rows_.mutable_data_ptr());
    task.chunks = static_cast<const int32_t*>(chunks_.const_data_ptr());
    task.chunk_count = count_;
  }

 private:
  UploadedTable(const StepTable& table, const std::vector<int32_t>& chunks, cudaStream_t stream)
      : rows_(uploaded(table.rows, table.device, stream)),
        chunks_(uploaded(chunks, table.device, stream)),
        count_(static_cast<int64_t>(chunks.size()) / kChunkColumns) {}

  Tensor rows_, chunks_;
  int64_t count_;
};

void check_on_device(const PlanArguments& plan, Device device) {
  STD_TORCH_CHECK(plan.device_table.is_contiguous() &&
                      plan.device_table.numel() == plan.table.numel() &&
                      plan.device_table.scalar_type() == ScalarType::Long,
                  "device_table must be a copy of table on the parameters' device");
  STD_TORCH_CHECK(plan.chunks.is_contiguous() && plan.chunks.scalar_type() == ScalarType::Int &&
                      device_of(plan.chunks) == device && plan.chunks.dim() == 2 &&
                      plan.chunks.size(1) == kChunkColumns,
                  "chunks must be a contiguous int32 tensor of ", int64_t{kChunkColumns},
                  " columns on the device of device_table");
}

void upload_plan(const PlanArguments& plan, const int64_t* rows, cudaStream_t stream) {
  upload(plan.device_table.mutable_data_ptr(), rows, plan.table.numel() * sizeof(int64_t), stream);
}

void put_in(cuda::StepLaunch& task, const PlanArguments& plan) {
  task.table = static_cast<int64_t*>(plan.device_table.mutable_data_ptr());
  task.chunks = static_cast<const int32_t*>(plan.chunks.const_data_ptr());
  task.chunk_count = plan.chunks.size(0);
}

// ---- the ops ----

template <class Rule>
void run(const cuda::StepLaunch& task, const Rule& rule, Device, cudaStream_t stream) {
  cuda::step(task, rule, stream);
}

void run(const cuda::StepLaunch& task, const Lamb& rule, Device device, cudaStream_t stream) {
  // The allocator hands the memory out again only to work that is queued later on the same stream.
  const Tensor workspace = empty_bytes(cuda::lamb_workspace(task), device);
  cuda::step(task, rule, workspace.mutable_data_ptr(), stream);
}

struct CudaSteps {
  template <class Rule>
  static void run_lists(const StepLists& lists, StepKeywords keywords, const Rule& rule) {
    StepTable table = step_table(lists, rule);
    int64_t* const rows = table.rows.data();
    const int64_t tensors = table.tensors();
    if (tensors == 0) return;
    const bool found = host_counts(rows, tensors, table.steps) && host_finds_inf(keywords);
    cuda::StepLaunch task =
        launch_of(keywords, table.dtype, table.storage, table.device, table.steps);
    if (found) return;

    if (!table.steps.on_device) {
      count_steps(rows, tensors, table.steps);
      set_steps(rows, tensors, table.steps);
    }
    const CudaDevice current(table.device);
    const cudaStream_t stream = current.stream();
    const UploadedTable uploaded(table, stream);
    uploaded.put_in(task);
    run(task, rule, table.device, stream);
  }

  // With counters on the device, and where the table has not moved, this is the launch alone: what
  // a CUDA graph can capture.
  template <class Rule>
  static void run_plan(const PlanArguments& plan, StepKeywords keywords, const Rule& rule) {
    int64_t* const rows = planned_table(plan.table);
    const int64_t tensors = plan.table.size(0);
    const PlanHeader header(plan.layouts);
    const Device device = device_of(plan.device_table);
    check_on_device(plan, device);
    const Steps steps = header.steps();
    if (tensors == 0) return;
    const bool found = host_counts(rows, tensors, steps) && host_finds_inf(keywords);
    cuda::StepLaunch task = launch_of(keywords, header.dtype(), header.storage(), device, steps);

    const bool counts = !steps.on_device && !found;
    const std::optional<int64_t> elapsed = counts ? count_steps(rows, tensors, steps) : int64_t{0};
    const CudaDevice current(device);
    const cudaStream_t stream = current.stream();
    if (plan.moved || !elapsed) {
      if (!steps.on_device) set_steps(rows, tensors, steps);
      upload_plan(plan, rows, stream);
    } else {
      task.elapsed = *elapsed;
    }
    if (found) return;  // with the device's copy of the table up to date
    put_in(task, plan);
    run(task, rule, device, stream);
  }
};

// ---- sums of squares ----

// squares[place] = the sum of squares of all gradients.
void put_squares(const Tensor& squares, int64_t place, const cuda::StepLaunch& task, Device device,
                 cudaStream_t stream) {
  check_squares(squares);
  STD_TORCH_CHECK(device_of(squares) == device,
                  "squares is on another device; it must be on the gradients' device");
  STD_TORCH_CHECK(0 <= place && place < squares.numel(), "place is ", place,
                  "; it must be a place of squares, which has ", squares.numel(), " numbers");
  const Tensor workspace = empty_bytes(cuda::squares_workspace(task), device);  // as LAMB's
  cuda::squares(task, workspace.mutable_data_ptr(),
                static_cast<double*>(squares.mutable_data_ptr()) + place, stream);
}

void squares(const Tensor& squares, int64_t place, const std::vector<Tensor>& grads) {
  StepTable table = gradient_table(grads);
  if (grads.empty()) table.device = device_of(squares);
  const CudaDevice current(table.device);
  const cudaStream_t stream = current.stream();
  const UploadedTable uploaded(table, stream);
  cuda::StepLaunch task{};
  task.dtype = table.dtype;
  uploaded.put_in(task);
  put_squares(squares, place, task, table.device, stream);
}

// Comes before the step by the same plan, which is then told that the table has not moved: kSteps
// are uploaded as the host has them, so the step finds what it left.
void boxed_squares_planned(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const PlanArguments plan(arguments);
  const Tensor squares = arguments.next<Tensor>();
  const int64_t place = arguments.next<int64_t>();
  const int64_t* const rows = planned_table(plan.table);
  const Device device = device_of(plan.device_table);
  check_on_device(plan, device);
  const CudaDevice current(device);
  const cudaStream_t stream = current.stream();
  if (plan.moved) upload_plan(plan, rows, stream);
  cuda::StepLaunch task{};
  task.dtype = PlanHeader(plan.layouts).dtype();
  put_in(task, plan);
  put_squares(squares, place, task, device, stream);
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, EFFKERN_CUDA_KEY, m) {
  effkern::register_steps<effkern::CudaSteps>(m, EFFKERN_CUDA_OVERLOAD);
  m.impl("_squares_" EFFKERN_CUDA_OVERLOAD, TORCH_BOX(&effkern::squares));
  m.impl("_squares_planned_" EFFKERN_CUDA_OVERLOAD, &effkern::boxed_squares_planned);
}
