// LAMB in two passes. The first moves the states on and sums the squares of each chunk of the
// parameter and of its direction; the second goes along the direction, computed again from the
// states: 24 bytes an element of float32 and 16.
// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/mixed.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {
namespace {

template <class T>
EFFKERN_INLINE Vec<T> advance_vector(const Arrays<T>& a, int64_t i, Acc<T> factor,
                                     const Lamb::Scalars<Acc<T>>& scalars, Vec<T> param) {
  Vec<T> grad = load(a.grad + i);
  Vec<T> state[kMostStates] = {load(a.state[0] + i), load(a.state[1] + i)};
  if (factor != Acc<T>(1)) grad = grad * factor;
  Lamb::advance(grad, state, scalars);
  store(a.state[0] + i, state[0]);
  store(a.state[1] + i, state[1]);
  // As the second pass will read them.
  const Vec<T> stored[kMostStates] = {load(a.state[0] + i), load(a.state[1] + i)};
  return Lamb::direction(param, stored, scalars);
}

template <class T>
void advance_chunk(const Arrays<T>& a, int64_t begin, int64_t end, Acc<T> factor,
                   const Lamb::Scalars<Acc<T>>& scalars, double* squares) {
  SumOfSquares<T> params, directions;
  const int64_t i = over_lines<T>(
      begin, end, [&](int64_t i) EFFKERN_LAMBDA { prefetch<Lamb, 0>(a, i + kAhead<T>); },
      [&](int64_t i) EFFKERN_LAMBDA {
        const Vec<T> param = load(a.param + i);
        directions.add(advance_vector(a, i, factor, scalars, param));
        params.add(param);
      });
  if (i < end) {
    Tail<T> tail(a, i, end - i);  // zeros behind the end, whose direction is 0 or NaN
    const Vec<T> param = load(tail.param);
    Vec<T> direction = advance_vector(tail.arrays(), 0, factor, scalars, param);
    for (int64_t lane = end - i; lane < kLanes<T>; ++lane) direction[lane] = 0;
    tail.write_back();
    directions.add(direction);
    params.add(param);
  }
  squares[0] = params.total();
  squares[1] = directions.total();
}

template <class T>
void advance(const StepTask& task, const Lamb& rule, double* squares, int64_t begin, int64_t end) {
  ScalarsOf<Lamb, Acc<T>> scalars(task, rule);
  for_each_chunk(task, begin, end, [&](const int64_t* row, int64_t from, int64_t to, int64_t c) {
    advance_chunk(arrays_at<T>(row), from, to, static_cast<Acc<T>>(task.factor), scalars.at(row),
                  squares + 2 * c);
  });
}

template <class T>
EFFKERN_INLINE void apply_vector(const Arrays<T>& a, int64_t i, Acc<T> step_size,
                                 const Lamb::Scalars<Acc<T>>& scalars) {
  const Vec<T> param = load(a.param + i);
  const Vec<T> state[kMostStates] = {load(a.state[0] + i), load(a.state[1] + i)};
  store(a.param + i, param - Lamb::direction(param, state, scalars) * step_size);
}

template <class T>
void apply(const StepTask& task, const Lamb& rule, const double* ratios, int64_t begin,
           int64_t end) {
  ScalarsOf<Lamb, Acc<T>> all_scalars(task, rule);
  int64_t first = 0;  // the number of elements in the tensors before this one
  for (int64_t t = 0; t < task.tensors && first < end; ++t) {
    const int64_t* const row = task.table + t * kTableColumns;
    const int64_t numel = row[kNumel];
    const int64_t from = granule_at_or_after(begin - first, numel);
    const int64_t to = granule_at_or_after(end - first, numel);
    first += numel;
    if (from >= to) continue;
    const Arrays<T> a = arrays_at<T>(row);
    const auto& scalars = all_scalars.at(row);
    const Acc<T> step_size = static_cast<Acc<T>>(task.lr * ratios[t]);
    // This pass reads no gradient; the parameter stands in its place, to be brought near.
    const Arrays<T> read = {a.param, a.param, {a.state[0], a.state[1]}};
    const int64_t i = over_lines<T>(
        from, to, [&](int64_t i) EFFKERN_LAMBDA { prefetch<Lamb, 0>(read, i + kAhead<T>); },
        [&](int64_t i) EFFKERN_LAMBDA { apply_vector(a, i, step_size, scalars); });
    if (i < to) {
      Tail<T> tail(a, i, to - i);
      apply_vector(tail.arrays(), 0, step_size, scalars);
      tail.write_back();
    }
  }
}

// ---- where not all is stored in the parameters' dtype ----

void sum_block(const Block<Lamb>& block, int64_t count, const Lamb::Scalars<float>& scalars,
               SumOfSquares<float>& params, SumOfSquares<float>& directions) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const Floats param = load(block.param + i);
    const Floats state[kMostStates] = {load(block.state[0].of + i), load(block.state[1].of + i)};
    Floats direction = Lamb::direction(param, state, scalars);
    for (int64_t lane = count - i; lane < kLanes<float>; ++lane) direction[lane] = 0;
    params.add(param);
    directions.add(direction);
  }
}

void advance_mixed(const StepTask& task, const Lamb& rule, double* squares, int64_t begin,
                   int64_t end) {
  ScalarsOf<Lamb, float> all_scalars(task, rule);
  Block<Lamb> block(task, rule);
  for_each_chunk(task, begin, end, [&](const int64_t* row, int64_t from, int64_t to, int64_t c) {
    const auto& scalars = all_scalars.at(row);
    SumOfSquares<float> params, directions;
    for (int64_t b = from; b < to; b += kBlock) {
      const int64_t count = to - b < kBlock ? to - b : kBlock;
      block.load_param(row, b, count);
      block.load_grad(row, b, count);
      block.load_states(row, b, count);
      for (int64_t i = 0; i < count; i += kLanes<float>) {
        Floats state[kMostStates] = {load(block.state[0].of + i), load(block.state[1].of + i)};
        Floats grad = load(block.grad + i);
        if (block.factor != 1) grad = grad * block.factor;
        Lamb::advance(grad, state, scalars);
        store(block.state[0].of + i, state[0]);
        store(block.state[1].of + i, state[1]);
      }
      block.store_states(row, b, count);
      block.load_states(row, b, count);  // as the second pass will read them
      sum_block(block, count, scalars, params, directions);
    }
    squares[2 * c] = params.total();
    squares[2 * c + 1] = directions.total();
  });
}

void apply_mixed(const StepTask& task, const Lamb& rule, const double* ratios, int64_t begin,
                 int64_t end) {
  ScalarsOf<Lamb, float> all_scalars(task, rule);
  Block<Lamb> block(task, rule);
  for_each_block(task, begin, end, [&](const int64_t* row, int64_t from, int64_t count) {
    const auto& scalars = all_scalars.at(row);
    const float step_size =
        static_cast<float>(task.lr * ratios[(row - task.table) / kTableColumns]);
    block.load_param(row, from, count);
    block.load_states(row, from, count);
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const Floats param = load(block.param + i);
      const Floats state[kMostStates] = {load(block.state[0].of + i), load(block.state[1].of + i)};
      store(block.param + i, param - Lamb::direction(param, state, scalars) * step_size);
    }
    block.store_param(row, from, count, all_scalars.step());
  });
}

}  // namespace

void lamb_advance(const StepTask& task, const Lamb& rule, double* squares, int64_t begin,
                  int64_t end) {
  if (!task.storage.plain()) return advance_mixed(task, rule, squares, begin, end);
  with_type(task.dtype,
            [&](auto type) { advance<decltype(type)>(task, rule, squares, begin, end); });
}

void lamb_apply(const StepTask& task, const Lamb& rule, const double* ratios, int64_t begin,
                int64_t end) {
  if (!task.storage.plain()) return apply_mixed(task, rule, ratios, begin, end);
  with_type(task.dtype, [&](auto type) { apply<decltype(type)>(task, rule, ratios, begin, end); });
}

}  // namespace effkern::cpu::EFFKERN_ISA
