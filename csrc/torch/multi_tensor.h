// The host's part of a multi-tensor step, for any update rule and device: arguments, plans, and
// tables made from lists of tensors. The ops are declared in effkern/ops/step.py.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "common/multi_tensor.h"
#include "math/quantize.h"
#include "math/rules.h"
#include "torch/arguments.h"

namespace effkern {

inline int64_t address_of(const Tensor& tensor) {
  return reinterpret_cast<int64_t>(tensor.data_ptr());
}

// ---- arguments ----

// Where step counters are and what they are made of; the second number of a plan's `layouts`.
struct Steps {
  bool are_double = false, on_device = false;
  static Steps of_code(int64_t code) { return {(code & 1) != 0, (code & 2) != 0}; }
};

// The keyword arguments that every rule's ops begin with.
struct StepKeywords {
  double lr;
  std::optional<Tensor> lr_tensor;              // instead of lr
  std::optional<Tensor> grad_scale, found_inf;  // of torch.amp.GradScaler
  std::optional<Tensor> squares;  // clip: their sum is that of the squares of all gradients
  double max_norm;
};

inline void check_squares(const Tensor& squares) {
  STD_TORCH_CHECK(
      squares.dim() == 1 && squares.is_contiguous() && squares.scalar_type() == ScalarType::Double,
      "squares must be a contiguous float64 tensor of one dimension");
}

// A boxed call's arguments, in their order. Each is taken over.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }

  StepKeywords keywords() {
    StepKeywords all;
    all.lr = next<double>();
    all.lr_tensor = next<std::optional<Tensor>>();
    all.grad_scale = next<std::optional<Tensor>>();
    all.found_inf = next<std::optional<Tensor>>();
    all.squares = next<std::optional<Tensor>>();
    all.max_norm = next<double>();
    for (const auto& [tensor, name] : {std::pair{&all.lr_tensor, "lr_tensor"},
                                       {&all.grad_scale, "grad_scale"},
                                       {&all.found_inf, "found_inf"}}) {
      if (!*tensor) continue;
      const ScalarType type = (*tensor)->scalar_type();
      STD_TORCH_CHECK(
          (*tensor)->numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double),
          name, " must be one float32 or float64 number");
    }
    return all;
  }

  template <class Rule>
  Rule rule() {
    Rule rule{};
    rule.each_field([&](auto& field) { field = next<std::decay_t<decltype(field)>>(); });
    return rule;
  }

 private:
  StableIValue* next_;
};

// The number in a tensor that `Arguments::keywords` has passed, on the CPU.
inline double number_in(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double
             ? *static_cast<const double*>(tensor.const_data_ptr())
             : *static_cast<const float*>(tensor.const_data_ptr());
}

// ---- the plan: made once, used at each step ----

struct PlanArguments {
  Tensor table, device_table, chunks, layouts;
  bool moved;

  explicit PlanArguments(Arguments& from)
      : table(from.next<Tensor>()),
        device_table(from.next<Tensor>()),
        chunks(from.next<Tensor>()),
        layouts(from.next<Tensor>()),
        moved(from.next<bool>()) {}
};

// The tensor `layouts` of a plan: [dtype code, code of `Steps`, code of `StateType`, 1 with masters
// + 2 with stochastic rounding, then for each tensor its ndim, sizes and strides].
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
  Steps steps() const { return Steps::of_code(numbers_[1]); }
  Storage storage() const {
    return {static_cast<StateType>(numbers_[2]), (numbers_[3] & 1) != 0, (numbers_[3] & 2) != 0};
  }
  const int64_t* layouts() const { return numbers_ + kHeader; }
  const int64_t* end() const { return end_; }

 private:
  static constexpr int64_t kHeader = 4;
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

// ---- step counters on the CPU ----

// t, the number of steps taken, of the tensor of one row; 0 where steps are not counted.
inline double step_of(const int64_t* row, Steps steps) {
  if (!row[kStep]) return 0;
  return steps.are_double ? *reinterpret_cast<const double*>(row[kStep])
                          : *reinterpret_cast<const float*>(row[kStep]);
}

// Adds one to it.
inline void increase_step(const int64_t* row, Steps steps) {
  if (!row[kStep]) return;
  if (steps.are_double) {
    *reinterpret_cast<double*>(row[kStep]) += 1.0;
  } else {
    *reinterpret_cast<float*>(row[kStep]) += 1.0f;
  }
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

// A table that serves one call; a plan's serves many.
struct StepTable {
  std::vector<int64_t> rows;
  DType dtype = DType::kFloat32;
  Device device{};
  Steps steps;
  Storage storage;
  int64_t tensors() const { return static_cast<int64_t>(rows.size()) / kTableColumns; }
};

// A table of gradients alone, of one dtype and device, each dense in memory.
inline StepTable gradient_table(const std::vector<Tensor>& grads) {
  StepTable table;
  if (grads.empty()) return table;
  table.dtype = dtype_of(grads[0], "grads[0]");
  table.device = device_of(grads[0]);
  table.rows.assign(grads.size() * kTableColumns, 0);
  for (size_t i = 0; i < grads.size(); ++i) {
    STD_TORCH_CHECK(device_of(grads[i]) == table.device &&
                        grads[i].scalar_type() == grads[0].scalar_type() && is_dense(grads[i]),
                    "grads[", i,
                    "] must have the dtype and device of grads[0] and fill one stretch of memory");
    table.rows[i * kTableColumns + kNumel] = grads[i].numel();
    table.rows[i * kTableColumns + kGrad] = address_of(grads[i]);
  }
  return table;
}

struct StepLists {
  std::vector<Tensor> params, grads;
  std::array<std::vector<Tensor>, kMostStates> states;
  std::vector<Tensor> steps;    // empty where they are not counted
  std::vector<Tensor> masters;  // float32; empty where there are none
  std::vector<Tensor> scales;   // of states in 8 bits: all of the first state, all of the next
  std::vector<int64_t> rounding_keys;  // empty where rounding is to the nearest
};

// How the states of a call are stored, from the first that the rule keeps.
template <class Rule>
StateType state_type(const StepLists& lists, const Rule& rule) {
  for (int s = 0; s < static_cast<int>(std::size(Rule::kStates)); ++s) {
    if (!Rule::has_state(rule.variant(), s) || lists.states[s].empty()) continue;
    const ScalarType type = lists.states[s][0].scalar_type();
    if (type == lists.params[0].scalar_type()) return StateType::kAsParam;
    if (type == ScalarType::Float) return StateType::kFloat32;
    if (type == ScalarType::BFloat16) return StateType::kBFloat16;
    if (type == ScalarType::Char || type == ScalarType::Byte) return StateType::kInt8;
    break;  // whatever it is, it is then refused for not being the parameter's
  }
  return StateType::kAsParam;
}

inline ScalarType scalar_type_of(StateType state, ScalarType param, bool is_signed) {
  switch (state) {
    case StateType::kAsParam:
      return param;
    case StateType::kFloat32:
      return ScalarType::Float;
    case StateType::kBFloat16:
      return ScalarType::BFloat16;
    case StateType::kInt8:
      return is_signed ? ScalarType::Char : ScalarType::Byte;
  }
  return param;
}

// The scales of state `state`, the `kept`-th that the rule keeps.
inline void fill_scales(const StepLists& lists, size_t kept, int state,
                        std::vector<int64_t>& rows) {
  const size_t count = lists.params.size();
  for (size_t i = 0; i < count; ++i) {
    const size_t place = kept * count + i;
    STD_TORCH_CHECK(place < lists.scales.size(), "scales has ", lists.scales.size(),
                    " tensors; it must have one for each parameter and state");
    const Tensor& scales = lists.scales[place];
    const int64_t blocks = (lists.params[i].numel() + kQuantizedBlock - 1) / kQuantizedBlock;
    STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
                        scales.numel() == blocks && device_of(scales) == device_of(lists.params[i]),
                    "scales[", place, "] must be ", blocks,
                    " contiguous float32 numbers on the parameters' device");
    rows[i * kTableColumns + kScale0 + state] = address_of(scales);
  }
}

inline void check_storage(const Storage& storage, DType dtype) {
  STD_TORCH_CHECK(storage.plain() || dtype != DType::kFloat64,
                  "float64 parameters have float64 states and no masters");
  STD_TORCH_CHECK(!storage.masters || dtype != DType::kFloat32,
                  "float32 parameters need no masters");
}

// Checks every tensor before anything is written.
template <class Rule>
StepTable step_table(const StepLists& lists, const Rule& rule) {
  StepTable table;
  const size_t count = lists.params.size();
  if (count == 0) return table;
  const Tensor& first = lists.params[0];
  table.dtype = dtype_of(first, "params[0]");
  table.device = device_of(first);
  table.rows.assign(count * kTableColumns, 0);

  const auto check_count = [&](const std::vector<Tensor>& tensors, const char* list) {
    STD_TORCH_CHECK(tensors.size() == count, list, " has ", tensors.size(),
                    " tensors; it must have as many as params, ", count);
  };
  const auto fill = [&](const std::vector<Tensor>& tensors, const char* list, int64_t column,
                        ScalarType type) {
    check_count(tensors, list);
    for (size_t i = 0; i < count; ++i) {
      const Tensor& param = lists.params[i];
      const std::string name = std::string(list) + "[" + std::to_string(i) + "]";
      check_like(tensors[i], name, param, "its parameter", type);
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
  const ScalarType type = first.scalar_type();
  fill(lists.params, "params", kParam, type);
  fill(lists.grads, "grads", kGrad, type);
  table.storage.state = state_type(lists, rule);
  for (int s = 0, kept = 0; s < static_cast<int>(std::size(Rule::kStates)); ++s) {
    if (!Rule::has_state(rule.variant(), s)) continue;
    fill(lists.states[s], Rule::kStates[s], kState0 + s,
         scalar_type_of(table.storage.state, type, Rule::is_signed(s)));
    if (table.storage.state == StateType::kInt8) fill_scales(lists, kept++, s, table.rows);
  }
  if (!lists.masters.empty()) {
    fill(lists.masters, "masters", kMaster, ScalarType::Float);
    table.storage.masters = true;
  }
  if (!lists.rounding_keys.empty()) {
    STD_TORCH_CHECK(lists.rounding_keys.size() == count && type == ScalarType::BFloat16,
                    "rounding_keys has ", lists.rounding_keys.size(),
                    " numbers; it must have one for each of params, which must be bfloat16");
    for (size_t i = 0; i < count; ++i) {
      table.rows[i * kTableColumns + kKey] = lists.rounding_keys[i];
    }
    table.storage.stochastic = true;
  }
  check_storage(table.storage, table.dtype);
  if (lists.steps.empty()) return table;

  check_count(lists.steps, "steps");
  table.steps.are_double = lists.steps[0].scalar_type() == ScalarType::Double;
  table.steps.on_device = !lists.steps[0].is_cpu();
  const ScalarType step_type = table.steps.are_double ? ScalarType::Double : ScalarType::Float;
  const Device step_device = device_of(lists.steps[0]);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& step = lists.steps[i];
    STD_TORCH_CHECK(step.numel() == 1 && step.scalar_type() == step_type &&
                        device_of(step) == step_device &&
                        (step.is_cpu() || step_device == table.device),
                    "steps[", i,
                    "] must be one number, float32, or float64 as all steps are, on the CPU or "
                    "all on the parameters' device");
    table.rows[i * kTableColumns + kStep] = address_of(step);
  }
  return table;
}

// ---- the ops ----

// `Backend` has run_lists(StepLists, StepKeywords, Rule) and run_plan(PlanArguments, StepKeywords,
// Rule), which make up a rule's op on lists and its op on plans.
template <class Backend, class Rule>
void boxed_lists(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  StepLists lists;
  lists.params = arguments.next<std::vector<Tensor>>();
  lists.grads = arguments.next<std::vector<Tensor>>();
  for (size_t s = 0; s < std::size(Rule::kStates); ++s) {
    lists.states[s] = arguments.next<std::vector<Tensor>>();
  }
  lists.steps = arguments.next<std::vector<Tensor>>();
  lists.masters = arguments.next<std::vector<Tensor>>();
  lists.scales = arguments.next<std::vector<Tensor>>();
  lists.rounding_keys = arguments.next<std::vector<int64_t>>();
  const StepKeywords keywords = arguments.keywords();
  Backend::run_lists(lists, keywords, arguments.rule<Rule>());
}

template <class Backend, class Rule>
void boxed_plan(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const PlanArguments plan(arguments);
  const StepKeywords keywords = arguments.keywords();
  Backend::run_plan(plan, keywords, arguments.rule<Rule>());
}

// Registers both ops of each rule as `_NAME_` and `_NAME_planned_` with `suffix` behind.
template <class Backend, class Library>
void register_steps(Library& m, const std::string& suffix = "") {
  const auto both = [&]<class Rule>(const Rule*) {
    const std::string name = std::string("_") + Rule::kName;
    m.impl((name + "_" + suffix).c_str(), &boxed_lists<Backend, Rule>);
    m.impl((name + "_planned_" + suffix).c_str(), &boxed_plan<Backend, Rule>);
  };
#define EFFKERN_REGISTER(Rule, name) both(static_cast<const Rule*>(nullptr));
  EFFKERN_ONE_PASS_RULES(EFFKERN_REGISTER)
#undef EFFKERN_REGISTER
  both(static_cast<const Lamb*>(nullptr));
}

}  // namespace effkern
