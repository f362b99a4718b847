// One step of any update rule over a table of tensors: each input read once, each output written
// once. What a .cpp file of a rule instantiates. cpu/kernels/isa.h must come first.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/streams.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Stretches of a tensor begin at multiples of this many elements, so that threads do not share a
// cache line.
constexpr int64_t kGranule = 64;

// A stretch of at most so many elements is small: see upcoming.
constexpr int64_t kSmall = 4096;

template <class T>
T* address(const int64_t* row, int64_t column) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(row[column]));
}

// The arrays of one tensor.
template <class T>
struct Arrays {
  T* param;
  const T* grad;
  T* state[kMostStates];
};

template <class T>
Arrays<T> arrays_at(const int64_t* row) {
  return {address<T>(row, kParam),
          address<T>(row, kGrad),
          {address<T>(row, kState0), address<T>(row, kState1), address<T>(row, kState2)}};
}

// What the rule needs of one tensor; computed anew only where the next tensor is at another step.
template <class Rule, class S>
class ScalarsOf {
 public:
  ScalarsOf(const StepTask& task, const Rule& rule) : task_(task), rule_(rule) {}

  const typename Rule::template Scalars<S>& at(const int64_t* row) {
    double step = 1;
    if (row[kStep]) {
      step = task_.steps_are_double ? *address<double>(row, kStep) : *address<float>(row, kStep);
    }
    if (step != step_) {
      scalars_ = rule_.template scalars<S>(task_.lr, step);
      step_ = step;
    }
    return scalars_;
  }
  // The number of the step that `at` gave them for.
  double step() const { return step_; }

 private:
  const StepTask& task_;
  const Rule& rule_;
  typename Rule::template Scalars<S> scalars_{};
  double step_ = 0;  // counts from 1
};

template <class Rule, int kVariant, class T, class S>
EFFKERN_INLINE void update_vector(const Arrays<T>& a, int64_t i, S factor,
                                  const typename Rule::template Scalars<S>& scalars) {
  Vec<T> param = load(a.param + i), grad = load(a.grad + i), state[kMostStates] = {};
  for (int s = 0; s < kMostStates; ++s) {
    if (Rule::has_state(kVariant, s)) state[s] = load(a.state[s] + i);
  }
  if (factor != S(1)) grad = grad * factor;
  Rule::template update<kVariant>(param, grad, state, scalars);
  store(a.param + i, param);
  for (int s = 0; s < kMostStates; ++s) {
    if (Rule::has_state(kVariant, s)) store(a.state[s] + i, state[s]);
  }
}

// The last elements of a tensor, copied out so that the same vector code serves them and no
// element's result depends on its place.
template <class T>
struct Tail {
  T param[kLanes<T>] = {}, grad[kLanes<T>] = {}, state[kMostStates][kLanes<T>] = {};
  const Arrays<T>& from;
  int64_t begin;
  size_t bytes;

  Tail(const Arrays<T>& a, int64_t first, int64_t count)
      : from(a), begin(first), bytes(static_cast<size_t>(count) * sizeof(T)) {
    __builtin_memcpy(param, from.param + begin, bytes);
    __builtin_memcpy(grad, from.grad + begin, bytes);
    for (int s = 0; s < kMostStates; ++s) {
      if (from.state[s]) __builtin_memcpy(state[s], from.state[s] + begin, bytes);
    }
  }
  Arrays<T> arrays() { return {param, grad, {state[0], state[1], state[2]}}; }
  void write_back() const {
    __builtin_memcpy(from.param + begin, param, bytes);
    for (int s = 0; s < kMostStates; ++s) {
      if (from.state[s]) __builtin_memcpy(from.state[s] + begin, state[s], bytes);
    }
  }
};

template <class Rule, int kVariant, class T>
EFFKERN_INLINE void prefetch(const Arrays<T>& a, int64_t i) {
  __builtin_prefetch(a.param + i, 1);
  __builtin_prefetch(a.grad + i);
  for (int s = 0; s < kMostStates; ++s) {
    if (Rule::has_state(kVariant, s)) __builtin_prefetch(a.state[s] + i, 1);
  }
}

// What is to be brought near while elements from `begin` on are updated: elements of `arrays` from
// `from` on, `count` of them.
template <class T>
struct Upcoming {
  const Arrays<T>& arrays;
  int64_t from, count;
};

// A large tensor's own next elements; of a small one, which ends before that helps, the next
// tensor.
template <class T>
Upcoming<T> upcoming(const Arrays<T>& a, int64_t begin, int64_t end, const Arrays<T>& next,
                     int64_t numel_of_next) {
  if (end - begin <= kSmall) return {next, 0, numel_of_next};
  return {a, begin + kAhead<T>, end - begin - kAhead<T>};
}

template <class Rule, int kVariant, class T, class S>
void update_stretch(const Arrays<T>& a, int64_t begin, int64_t end, S factor,
                    const typename Rule::template Scalars<S>& scalars, const Upcoming<T>& coming) {
  const int64_t i = over_lines<T>(
      begin, end,
      [&](int64_t i) EFFKERN_LAMBDA {
        if (i - begin < coming.count) {
          prefetch<Rule, kVariant>(coming.arrays, coming.from + (i - begin));
        }
      },
      [&](int64_t i) EFFKERN_LAMBDA { update_vector<Rule, kVariant>(a, i, factor, scalars); });
  if (i < end) {
    Tail<T> tail(a, i, end - i);
    update_vector<Rule, kVariant>(tail.arrays(), 0, factor, scalars);
    tail.write_back();
  }
}

EFFKERN_INLINE int64_t granule_at_or_after(int64_t element, int64_t numel) {
  if (element <= 0) return 0;
  const int64_t rounded = (element + kGranule - 1) / kGranule * kGranule;
  return rounded < numel ? rounded : numel;
}

template <class Rule, int kVariant, class T>
void update(const StepTask& task, const Rule& rule, int64_t begin, int64_t end) {
  using S = Acc<T>;
  ScalarsOf<Rule, S> scalars(task, rule);
  const S factor = static_cast<S>(task.factor);
  int64_t first = 0;  // the number of elements in the tensors before this one
  for (int64_t i = 0; i < task.tensors && first < end; ++i) {
    const int64_t* const row = task.table + i * kTableColumns;
    const int64_t numel = row[kNumel];
    const int64_t from = granule_at_or_after(begin - first, numel);
    const int64_t to = granule_at_or_after(end - first, numel);
    first += numel;
    if (from >= to) continue;
    const bool is_last = i + 1 == task.tensors;
    const int64_t* const next = is_last ? row : row + kTableColumns;
    const Arrays<T> arrays = arrays_at<T>(row), next_arrays = arrays_at<T>(next);
    update_stretch<Rule, kVariant>(
        arrays, from, to, factor, scalars.at(row),
        upcoming(arrays, from, to, next_arrays, is_last ? 0 : next[kNumel]));
  }
}

template <class Rule, class T, int kVariant = 0>
void update_variant(const StepTask& task, const Rule& rule, int64_t begin, int64_t end) {
  if (rule.variant() == kVariant) return update<Rule, kVariant, T>(task, rule, begin, end);
  if constexpr (kVariant + 1 < Rule::kVariants) {
    update_variant<Rule, T, kVariant + 1>(task, rule, begin, end);
  }
}

// Sums squares of vectors, in double: squares of float32 overflow, and sums of many lose digits.
template <class T>
class SumOfSquares {
 public:
  EFFKERN_MEMBER void add(Vec<T> x) {
    if constexpr (sizeof(Acc<T>) == sizeof(double)) {
      low_ += x * x;
    } else {
      const auto [low, high] = widened(x);
      low_ += low * low;
      high_ += high * high;
    }
  }
  EFFKERN_MEMBER double total() const { return sum_lanes(low_ + high_); }

 private:
  Doubles low_ = {}, high_ = {};
};

// Calls body(row, from, to, chunk) for the chunks [begin, end), counted through all tensors:
// elements [from, to) of the tensor of `row`.
template <class Body>
EFFKERN_INLINE void for_each_chunk(const StepTask& task, int64_t begin, int64_t end,
                                   const Body& body) {
  int64_t first = 0;  // the number of chunks in the tensors before this one
  for (int64_t i = 0; i < task.tensors && first < end; ++i) {
    const int64_t* const row = task.table + i * kTableColumns;
    const int64_t numel = row[kNumel], chunks = (numel + kChunk - 1) / kChunk;
    const int64_t last = end - first < chunks ? end - first : chunks;
    for (int64_t c = begin > first ? begin - first : 0; c < last; ++c) {
      const int64_t to = (c + 1) * kChunk < numel ? (c + 1) * kChunk : numel;
      body(row, c * kChunk, to, first + c);
    }
    first += chunks;
  }
}

// Calls body with a value of the storage type that `dtype` names.
template <class Body>
EFFKERN_INLINE void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

// The elements [begin, end), counted through all tensors in the table's order.
template <class Rule>
void step(const StepTask& task, const Rule& rule, int64_t begin, int64_t end) {
  with_type(task.dtype,
            [&](auto type) { update_variant<Rule, decltype(type)>(task, rule, begin, end); });
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
