// The sum of squares of each chunk of each tensor's gradient.
// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/step.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {
namespace {

template <class T>
double sum_of_squares(const T* x, int64_t count) {
  SumOfSquares<T> sums[4];
  const int64_t quarter = count / (4 * kLanes<T>)*kLanes<T>;
  over_lines<T>(
      0, quarter,
      [&](int64_t i) EFFKERN_LAMBDA {  // of the chunk that comes next
        for (int q = 0; q < 4; ++q) __builtin_prefetch(x + count + q * quarter + i);
      },
      [&](int64_t i) EFFKERN_LAMBDA {
        for (int q = 0; q < 4; ++q) sums[q].add(load(x + q * quarter + i));
      });
  int64_t i = 4 * quarter;
  for (; i + kLanes<T> <= count; i += kLanes<T>) sums[0].add(load(x + i));
  sums[1].add(load_first(x + i, count - i));
  return (sums[0].total() + sums[1].total()) + (sums[2].total() + sums[3].total());
}

template <class T>
void of_chunks(const StepTask& task, double* squares, int64_t begin, int64_t end) {
  for_each_chunk(task, begin, end, [&](const int64_t* row, int64_t from, int64_t to, int64_t c) {
    squares[c] = sum_of_squares(address<const T>(row, kGrad) + from, to - from);
  });
}

}  // namespace

void squares(const StepTask& task, double* squares, int64_t begin, int64_t end) {
  with_type(task.dtype, [&](auto type) { of_chunks<decltype(type)>(task, squares, begin, end); });
}

}  // namespace effkern::cpu::EFFKERN_ISA
