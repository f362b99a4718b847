// Adam over a table of tensors: 16 bytes read and 12 written an element of float32, each once.
// clang-format off: the vectors' square_root and larger must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "math/adam.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Stretches of a tensor begin at multiples of this many elements, so that threads do not share a
// cache line.
constexpr int64_t kGranule = 64;

// A tensor of at most so many elements is small: see update_stretch.
constexpr int64_t kSmall = 4096;

template <class T>
T* address(const int64_t* row, TableColumn column) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(row[column]));
}

// The arrays of one tensor.
template <class T>
struct Tensor {
  T* param;
  const T* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;
};

template <class T, bool kAmsgrad>
EFFKERN_INLINE void update_vector(const Tensor<T>& t, int64_t i,
                                  const AdamScalars<Acc<T>>& scalars) {
  Vec<T> param = load(t.param + i), exp_avg = load(t.exp_avg + i),
         exp_avg_sq = load(t.exp_avg_sq + i);
  Vec<T> max_exp_avg_sq = {};
  if constexpr (kAmsgrad) max_exp_avg_sq = load(t.max_exp_avg_sq + i);
  adam_update<kAmsgrad>(param, load(t.grad + i), exp_avg, exp_avg_sq, max_exp_avg_sq, scalars);
  store(t.param + i, param);
  store(t.exp_avg + i, exp_avg);
  store(t.exp_avg_sq + i, exp_avg_sq);
  if constexpr (kAmsgrad) store(t.max_exp_avg_sq + i, max_exp_avg_sq);
}

// The last elements go through the same vector code on a copy, so that no element's result depends
// on its place.
template <class T, bool kAmsgrad>
void update_tail(const Tensor<T>& t, int64_t begin, int64_t count,
                 const AdamScalars<Acc<T>>& scalars) {
  T param[kLanes<T>] = {}, grad[kLanes<T>] = {}, state[3][kLanes<T>] = {};
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  __builtin_memcpy(param, t.param + begin, bytes);
  __builtin_memcpy(grad, t.grad + begin, bytes);
  __builtin_memcpy(state[0], t.exp_avg + begin, bytes);
  __builtin_memcpy(state[1], t.exp_avg_sq + begin, bytes);
  if constexpr (kAmsgrad) __builtin_memcpy(state[2], t.max_exp_avg_sq + begin, bytes);
  update_vector<T, kAmsgrad>({param, grad, state[0], state[1], state[2]}, 0, scalars);
  __builtin_memcpy(t.param + begin, param, bytes);
  __builtin_memcpy(t.exp_avg + begin, state[0], bytes);
  __builtin_memcpy(t.exp_avg_sq + begin, state[1], bytes);
  if constexpr (kAmsgrad) __builtin_memcpy(t.max_exp_avg_sq + begin, state[2], bytes);
}

template <class T, bool kAmsgrad>
EFFKERN_INLINE void prefetch(const Tensor<T>& t, int64_t i) {
  __builtin_prefetch(t.param + i, 1);
  __builtin_prefetch(t.grad + i);
  __builtin_prefetch(t.exp_avg + i, 1);
  __builtin_prefetch(t.exp_avg_sq + i, 1);
  if constexpr (kAmsgrad) __builtin_prefetch(t.max_exp_avg_sq + i, 1);
}

// While a small tensor is updated, the next one is brought near: the hardware follows a stream only
// once it is under way, and a small tensor ends before that. `ahead` is how much of `next` is worth
// it.
template <class T, bool kAmsgrad>
void update_stretch(const Tensor<T>& t, int64_t begin, int64_t end,
                    const AdamScalars<Acc<T>>& scalars, const Tensor<T>& next, int64_t ahead) {
  int64_t i = begin;
  for (int64_t j = 0; j < ahead && i + kLanes<T> <= end; i += kLanes<T>, j += kLanes<T>) {
    prefetch<T, kAmsgrad>(next, j);
    update_vector<T, kAmsgrad>(t, i, scalars);
  }
  for (; i + kLanes<T> <= end; i += kLanes<T>) update_vector<T, kAmsgrad>(t, i, scalars);
  if (i < end) update_tail<T, kAmsgrad>(t, i, end - i, scalars);
}

template <class T>
Tensor<T> tensor_at(const int64_t* row) {
  return {address<T>(row, kParam), address<T>(row, kGrad), address<T>(row, kState0),
          address<T>(row, kState1), address<T>(row, kState2)};
}

int64_t granule_at_or_after(int64_t element, int64_t numel) {
  if (element <= 0) return 0;
  const int64_t rounded = (element + kGranule - 1) / kGranule * kGranule;
  return rounded < numel ? rounded : numel;
}

template <class T, bool kAmsgrad>
void update(const AdamTask& task, int64_t begin, int64_t end) {
  AdamScalars<Acc<T>> scalars{};
  double scalars_step = 0;  // the step that `scalars` are for; steps count from 1
  int64_t first = 0;        // the number of elements in the tensors before this one
  for (int64_t i = 0; i < task.tensors && first < end; ++i) {
    const int64_t* row = task.table + i * kTableColumns;
    const int64_t numel = row[kNumel];
    const int64_t from = granule_at_or_after(begin - first, numel);
    const int64_t to = granule_at_or_after(end - first, numel);
    first += numel;
    if (from >= to) continue;
    const double step =
        task.steps_are_double ? *address<double>(row, kStep) : *address<float>(row, kStep);
    if (step != scalars_step) {
      scalars = adam_scalars<Acc<T>>(task.options, step);
      scalars_step = step;
    }
    const int64_t* const next = i + 1 < task.tensors ? row + kTableColumns : row;
    const int64_t ahead = to - from <= kSmall && next != row ? next[kNumel] : 0;
    update_stretch<T, kAmsgrad>(tensor_at<T>(row), from, to, scalars, tensor_at<T>(next), ahead);
  }
}

template <class T>
void update(const AdamTask& task, int64_t begin, int64_t end) {
  return task.options.amsgrad ? update<T, true>(task, begin, end)
                              : update<T, false>(task, begin, end);
}

}  // namespace

void adam(const AdamTask& task, int64_t begin, int64_t end) {
  switch (task.dtype) {
    case DType::kFloat32:
      return update<float>(task, begin, end);
    case DType::kFloat64:
      return update<double>(task, begin, end);
    case DType::kBFloat16:
      return update<BFloat16>(task, begin, end);
    case DType::kFloat16:
      return update<Float16>(task, begin, end);
  }
}

}  // namespace effkern::cpu::EFFKERN_ISA
