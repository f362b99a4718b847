// The host's part of a multi-tensor optimizer step: the table of common/multi_tensor.h from lists
// of tensors, the check of gradients against a plan, the step counters. Device-neutral.
#pragma once

#include <string>
#include <vector>

#include "common/adam.h"
#include "common/multi_tensor.h"
#include "torch/arguments.h"

namespace effkern {

inline int64_t address_of(const Tensor& tensor) {
  return reinterpret_cast<int64_t>(tensor.data_ptr());
}

// ---- the plan: made once, used at each step ----

// The tensor `layouts` of a plan: [dtype code, 1 if steps are float64 else 0, then for each tensor
// its ndim, sizes and strides].
class PlanHeader {
 public:
  explicit PlanHeader(const Tensor& layouts) {
    STD_TORCH_CHECK(
        layouts.is_cpu() && layouts.is_contiguous() && layouts.scalar_type() == ScalarType::Long,
        "layouts must be a contiguous int64 CPU tensor");
    STD_TORCH_CHECK(layouts.numel() >= kHeader, "layouts has ", layouts.numel(),
                    " numbers; it must have at least ", kHeader);
    numbers_ = static_cast<const int64_t*>(layouts.const_data_ptr());
    end_ = numbers_ + layouts.numel();
  }

  DType dtype() const { return static_cast<DType>(numbers_[0]); }
  bool steps_are_double() const { return numbers_[1] != 0; }
  const int64_t* layouts() const { return numbers_ + kHeader; }
  const int64_t* end() const { return end_; }

 private:
  static constexpr int64_t kHeader = 2;
  const int64_t* numbers_;
  const int64_t* end_;
};

// The rows of a plan's table, checked.
inline int64_t* planned_table(const Tensor& table) {
  STD_TORCH_CHECK(
      table.is_cpu() && table.is_contiguous() && table.scalar_type() == ScalarType::Long &&
          table.dim() == 2 && table.size(1) == kTableColumns,
      "table must be a contiguous int64 CPU tensor of ", int64_t{kTableColumns}, " columns");
  return static_cast<int64_t*>(table.mutable_data_ptr());
}

// ---- step counters ----

// t, the number of steps taken, of the tensor of one row.
inline double step_of(const int64_t* row, bool is_double) {
  return is_double ? *reinterpret_cast<const double*>(row[kStep])
                   : *reinterpret_cast<const float*>(row[kStep]);
}

// Adds one to it and returns the new value.
inline double increase_step(const int64_t* row, bool is_double) {
  if (is_double) return *reinterpret_cast<double*>(row[kStep]) += 1.0;
  return *reinterpret_cast<float*>(row[kStep]) += 1.0f;
}

// ---- a table for one call, from lists ----

// True where the elements fill one stretch of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t ndim = static_cast<int64_t>(sizes.size());
  int64_t filled = 1;
  for (int64_t found = 0; found < ndim; ++found) {
    int64_t d = 0;
    while (d < ndim && !(sizes[d] != 1 && strides[d] == filled)) ++d;
    if (d == ndim) break;
    filled *= sizes[d];
  }
  return filled == tensor.numel();
}

struct AdamLists {
  const std::vector<Tensor>&params, &grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &steps;
};

// A table that serves one call; `_adam_planned_` keeps one for many.
struct AdamTable {
  std::vector<int64_t> rows;
  DType dtype = DType::kFloat32;
  Device device{};
  bool steps_are_double = false;
  int64_t tensors() const { return static_cast<int64_t>(rows.size()) / kTableColumns; }
};

// Checks every tensor before anything is written.
inline AdamTable adam_table(const AdamLists& lists, bool amsgrad) {
  AdamTable table;
  const size_t count = lists.params.size();
  if (count == 0) return table;
  const Tensor& first = lists.params[0];
  table.dtype = dtype_of(first, "params[0]");
  table.device = device_of(first);
  table.rows.assign(count * kTableColumns, 0);

  const auto fill = [&](const std::vector<Tensor>& tensors, const char* list, TableColumn column) {
    STD_TORCH_CHECK(tensors.size() == count, list, " has ", tensors.size(),
                    " tensors; it must have as many as params, ", count);
    for (size_t i = 0; i < count; ++i) {
      const Tensor& param = lists.params[i];
      const std::string name = std::string(list) + "[" + std::to_string(i) + "]";
      check_like(tensors[i], name, param, "its parameter");
      for (int64_t d = 0; param.numel() > 0 && d < param.dim(); ++d) {
        STD_TORCH_CHECK(param.size(d) == 1 || tensors[i].stride(d) == param.stride(d), name,
                        " has strides ", text_of(tensors[i].strides()),
                        "; it must have those of its parameter, ", text_of(param.strides()));
      }
      table.rows[i * kTableColumns + column] = address_of(tensors[i]);
    }
  };
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = lists.params[i];
    const std::string name = "params[" + std::to_string(i) + "]";
    STD_TORCH_CHECK(device_of(param) == table.device && param.scalar_type() == first.scalar_type(),
                    name,
                    " has another dtype or device than params[0]; one call takes one of each");
    STD_TORCH_CHECK(is_dense(param), name, " has strides ", text_of(param.strides()),
                    "; it must fill one stretch of memory");
    table.rows[i * kTableColumns + kNumel] = param.numel();
  }
  fill(lists.params, "params", kParam);
  fill(lists.grads, "grads", kGrad);
  fill(lists.exp_avgs, "exp_avgs", kState0);
  fill(lists.exp_avg_sqs, "exp_avg_sqs", kState1);
  if (amsgrad) fill(lists.max_exp_avg_sqs, "max_exp_avg_sqs", kState2);

  STD_TORCH_CHECK(lists.steps.size() == count, "steps has ", lists.steps.size(),
                  " tensors; it must have as many as params, ", count);
  table.steps_are_double = lists.steps[0].scalar_type() == ScalarType::Double;
  const ScalarType step_type = table.steps_are_double ? ScalarType::Double : ScalarType::Float;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& step = lists.steps[i];
    STD_TORCH_CHECK(step.is_cpu() && step.numel() == 1 && step.scalar_type() == step_type, "steps[",
                    i, "] must be one number on the CPU, float32, or float64 as all steps are");
    table.rows[i * kTableColumns + kStep] = address_of(step);
  }
  return table;
}

}  // namespace effkern
