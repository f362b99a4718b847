// The update rules' ops for CPU tensors: one step from lists of tensors, or by plan.
#include "math/clip.h"
#include "torch/cpu.h"
#include "torch/multi_tensor.h"

namespace effkern {
namespace {

// Counting a step is waiting for memory: threads wait side by side.
constexpr int64_t kTensorsAThread = 256;

struct CpuSteps {
  template <class Rule>
  static void run_lists(const StepLists& lists, const StepKeywords& keywords, const Rule& rule) {
    const StepTable table = step_table(lists, rule);
    run({table.dtype, table.storage, table.steps.are_double, table.rows.data(), table.tensors(), 0,
         1},
        keywords, rule);
  }

  template <class Rule>
  static void run_plan(const PlanArguments& plan, const StepKeywords& keywords, const Rule& rule) {
    const PlanHeader header(plan.layouts);
    run({header.dtype(), header.storage(), header.steps().are_double, planned_table(plan.table),
         plan.table.size(0), 0, 1},
        keywords, rule);
  }

 private:
  template <class Rule>
  static void run(cpu::StepTask task, const StepKeywords& keywords, const Rule& rule) {
    check_storage(task.storage, task.dtype);
    for (const auto* tensor :
         {&keywords.lr_tensor, &keywords.grad_scale, &keywords.found_inf, &keywords.squares}) {
      STD_TORCH_CHECK(!*tensor || (*tensor)->is_cpu(),
                      "lr_tensor, grad_scale, found_inf and squares must be CPU tensors, as the "
                      "parameters");
    }
    if (keywords.found_inf && number_in(*keywords.found_inf) != 0.0) return;
    task.lr = keywords.lr_tensor ? number_in(*keywords.lr_tensor) : keywords.lr;
    const double scale = keywords.grad_scale ? number_in(*keywords.grad_scale) : 1.0;
    task.factor = 1.0 / scale;
    if (keywords.squares) {
      const auto* const squares = static_cast<const double*>(keywords.squares->const_data_ptr());
      double sum = 0;
      for (int64_t i = 0; i < keywords.squares->numel(); ++i) sum += squares[i];
      task.factor = clipping_factor(sum, scale, keywords.max_norm);
    }
    cpu::in_threads(torch_threads, task.tensors, kTensorsAThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        increase_step(task.table + i * kTableColumns, {task.steps_are_double});
      }
    });
    cpu::step(task, rule, torch_threads);
  }
};

// squares[place] = the sum of squares of all gradients.
void put_squares(const Tensor& squares, int64_t place, const cpu::StepTask& task) {
  check_squares(squares);
  STD_TORCH_CHECK(0 <= place && place < squares.numel() && squares.is_cpu(), "place is ", place,
                  "; squares must be a CPU tensor that has it");
  static_cast<double*>(squares.mutable_data_ptr())[place] = cpu::squares(task, torch_threads);
}

void squares(const Tensor& squares, int64_t place, const std::vector<Tensor>& grads) {
  const StepTable table = gradient_table(grads);
  put_squares(squares, place, {table.dtype, {}, false, table.rows.data(), table.tensors(), 0, 1});
}

void squares_planned(const Tensor& table, const Tensor& device_table, const Tensor& chunks,
                     const Tensor& layouts, bool moved, const Tensor& squares, int64_t place) {
  (void)device_table, (void)chunks, (void)moved;  // a GPU's
  const DType dtype = PlanHeader(layouts).dtype();
  put_squares(squares, place, {dtype, {}, false, planned_table(table), table.size(0), 0, 1});
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  effkern::register_steps<effkern::CpuSteps>(m);
  m.impl("_squares_", TORCH_BOX(&effkern::squares));
  m.impl("_squares_planned_", TORCH_BOX(&effkern::squares_planned));
}
