// clang-format off: the vectors' functions must be declared before the loops over them
#include "cpu/kernels/isa.h"
#include "cpu/kernels/streams.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {
namespace {

constexpr int64_t kMostArrays = 8;

// The number of arrays is known to the compiler, so that the loop does nothing but move memory.
template <int64_t kReads>
void sum_into_outputs(const BandwidthTask& task, int64_t begin, int64_t end) {
  const auto near = [&](int64_t i) EFFKERN_LAMBDA {
    for (int64_t r = 0; r < kReads; ++r) __builtin_prefetch(task.inputs[r] + i + kAhead<float>);
  };
  over_lines<float>(begin, end, near, [&](int64_t i) EFFKERN_LAMBDA {
    Floats sum = {};
    for (int64_t r = 0; r < kReads; ++r) sum += load(task.inputs[r] + i);
    for (int64_t w = 0; w < task.writes; ++w) store(task.outputs[w] + i, sum);
  });
}

template <int64_t kReads>
void choose(const BandwidthTask& task, int64_t begin, int64_t end) {
  if (task.reads == kReads) return sum_into_outputs<kReads>(task, begin, end);
  if constexpr (kReads < kMostArrays) choose<kReads + 1>(task, begin, end);
}

}  // namespace

void bandwidth(const BandwidthTask& task, int64_t begin, int64_t end) {
  const int64_t whole = end / kLanes<float> * kLanes<float>;  // a bandwidth needs no tail
  choose<1>(task, begin, whole);
}

}  // namespace effkern::cpu::EFFKERN_ISA
