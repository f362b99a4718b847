// The update rules' ops for CPU tensors: one step from lists of tensors, or by plan.
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
    run({table.dtype, table.steps.are_double, table.rows.data(), table.tensors(), 0, 1}, keywords,
        rule);
  }

  template <class Rule>
  static void run_plan(const PlanArguments& plan, const StepKeywords& keywords, const Rule& rule) {
    const PlanHeader header(plan.layouts);
    run({header.dtype(), header.steps().are_double, planned_table(plan.table), plan.table.size(0),
         0, 1},
        keywords, rule);
  }

 private:
  template <class Rule>
  static void run(cpu::StepTask task, const StepKeywords& keywords, const Rule& rule) {
    for (const auto* tensor : {&keywords.lr_tensor, &keywords.grad_scale, &keywords.found_inf}) {
      STD_TORCH_CHECK(!*tensor || (*tensor)->is_cpu(),
                      "lr_tensor, grad_scale and found_inf must be CPU tensors, as the parameters");
    }
    if (keywords.found_inf && number_in(*keywords.found_inf) != 0.0) return;
    task.lr = keywords.lr_tensor ? number_in(*keywords.lr_tensor) : keywords.lr;
    if (keywords.grad_scale) task.factor = 1.0 / number_in(*keywords.grad_scale);
    cpu::in_threads(torch_threads, task.tensors, kTensorsAThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        increase_step(task.table + i * kTableColumns, {task.steps_are_double});
      }
    });
    cpu::step(task, rule, torch_threads);
  }
};

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { effkern::register_steps<effkern::CpuSteps>(m); }
