// effkern::_adam_ and _adam_planned_ for CPU tensors.
#include "torch/cpu.h"
#include "torch/multi_tensor.h"

namespace effkern {
namespace {

using Tensors = std::vector<Tensor>;

// Counting a step is waiting for memory: threads wait side by side.
constexpr int64_t kTensorsAThread = 256;

void run(const cpu::AdamTask& task) {
  cpu::in_threads(torch_threads, task.tensors, kTensorsAThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      increase_step(task.table + i * kTableColumns, task.steps_are_double);
    }
  });
  cpu::adam(task, torch_threads);
}

void adam(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
          const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& steps,
          double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
          bool amsgrad, bool maximize) {
  const AdamTable table =
      adam_table({params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps}, amsgrad);
  run({table.dtype,
       table.steps_are_double,
       table.rows.data(),
       table.tensors(),
       {lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize}});
}

void adam_planned(const Tensor& table, const Tensor& device_table, const Tensor& chunks,
                  const Tensor& layouts, bool moved, double lr, double beta1, double beta2,
                  double eps, double weight_decay, bool decoupled, bool amsgrad, bool maximize) {
  (void)device_table, (void)chunks, (void)moved;  // a GPU's
  const PlanHeader plan(layouts);
  run({plan.dtype(),
       plan.steps_are_double(),
       planned_table(table),
       table.size(0),
       {lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize}});
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("_adam_", TORCH_BOX(&effkern::adam));
  m.impl("_adam_planned_", TORCH_BOX(&effkern::adam_planned));
}
