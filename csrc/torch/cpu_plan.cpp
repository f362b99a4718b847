// effkern::_put_gradients_: the gradients of a step enter its plan, for tensors on any device and
// for every update rule.
#include <atomic>

#include "common/multi_tensor.h"
#include "torch/cpu.h"
#include "torch/multi_tensor.h"
#include "torch/tensor_list.h"

namespace effkern {
namespace {

// What a plan says of its tensors.
struct Planned {
  int64_t* rows;           // of the table
  const int64_t* layouts;  // behind the header: each tensor's ndim, sizes and strides
  const int64_t* end;
  int64_t tensors;
  int32_t dtype;
  Device device;
};

// Whether a tensor has the plan's dtype and device, and lies as `layout` says. Strides count only
// where there is more than one element along them.
bool is_planned(AtenTensorHandle tensor, const Planned& plan, const int64_t* layout) {
  int32_t dtype, type, index;
  int64_t ndim, *sizes, *strides;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &ndim));
  if (dtype != plan.dtype || !(Device{type, index} == plan.device) || ndim != layout[0]) {
    return false;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  bool any = true;
  for (int64_t d = 0; d < ndim; ++d) {
    if (sizes[d] != layout[1 + d]) return false;
    any = any && sizes[d] > 0;
  }
  for (int64_t d = 0; any && d < ndim; ++d) {
    if (sizes[d] > 1 && strides[d] != layout[1 + ndim + d]) return false;
  }
  return true;
}

int64_t address_of(AtenTensorHandle tensor) {
  void* address;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &address));
  return reinterpret_cast<int64_t>(address);
}

// The layout of tensor number `wanted`, `layout` being that of number `i`.
const int64_t* advance(const Planned& plan, const int64_t* layout, int64_t i, int64_t wanted) {
  for (; i < wanted; ++i) {
    STD_TORCH_CHECK(layout < plan.end && layout + 1 + 2 * layout[0] <= plan.end,
                    "layouts ends before tensor ", i);
    layout += 1 + 2 * layout[0];
  }
  return layout;
}

// Nearly all of the time goes into waiting for memory: threads wait side by side.
constexpr int64_t kTensorsAThread = 256;

// The first tensor that is not as planned, or the number of tensors.
int64_t first_unplanned(const Planned& plan, const TensorList& params, const TensorList& grads) {
  std::atomic<int64_t> first = plan.tensors;
  advance(plan, plan.layouts, 0, plan.tensors);  // whole?
  cpu::in_threads(torch_threads, plan.tensors, kTensorsAThread, [&](int64_t begin, int64_t end) {
    const int64_t* layout = advance(plan, plan.layouts, 0, begin);
    for (int64_t i = begin; i < end; ++i) {
      const bool moved = address_of(params[i]) != plan.rows[i * kTableColumns + kParam];
      if (moved || !is_planned(params[i], plan, layout) || !is_planned(grads[i], plan, layout)) {
        int64_t before = first;
        while (i < before && !first.compare_exchange_weak(before, i)) continue;
        return;
      }
      layout += 1 + 2 * layout[0];
    }
  });
  return first;
}

// Puts the gradients' addresses in the table; true if one differs from what stood there.
bool put(const Planned& plan, const TensorList& grads) {
  std::atomic<bool> changed = false;
  cpu::in_threads(torch_threads, plan.tensors, kTensorsAThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t& place = plan.rows[i * kTableColumns + kGrad];
      const int64_t address = address_of(grads[i]);
      if (place != address) changed = true;
      place = address;
    }
  });
  return changed;
}

int64_t put_gradients(const Tensor& table, const Tensor& device_table, const Tensor& layouts,
                      const TensorList& params, const TensorList& grads) {
  const PlanHeader header(layouts);
  const Planned plan{
      planned_table(table),          header.layouts(),       header.end(), table.size(0),
      torch_code_of(header.dtype()), device_of(device_table)};
  STD_TORCH_CHECK(params.size() == plan.tensors && grads.size() == plan.tensors, "params has ",
                  params.size(), " tensors and grads ", grads.size(),
                  "; each must have one for each of the ", plan.tensors, " rows of table");
  const int64_t unplanned = first_unplanned(plan, params, grads);
  if (unplanned < plan.tensors) return -1 - unplanned;
  return put(plan, grads);
}

void boxed(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const auto table = to<Tensor>(stack[0]), device_table = to<Tensor>(stack[1]),
             layouts = to<Tensor>(stack[2]);
  const TensorList params(stack[3]), grads(stack[4]);
  stack[0] =
      torch::stable::detail::from(put_gradients(table, device_table, layouts, params, grads));
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CompositeExplicitAutograd, m) {
  m.impl("_put_gradients_", &effkern::boxed);
}
