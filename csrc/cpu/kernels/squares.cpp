// The sum of squares of each chunk of each tensor's gradient.
// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/step.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {
namespace {

template <class T>
double sum_of_squares(const T* x, int64_t count) {
  SumOfSquares<T> sum;
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) sum.add(load(x + i));
  T tail[kLanes<T>] = {};
  __builtin_memcpy(tail, x + i, static_cast<size_t>(count - i) * sizeof(T));
  sum.add(load(tail));
  return sum.total();
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
