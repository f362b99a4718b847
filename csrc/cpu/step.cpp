// A multi-tensor step cut for threads, for any update rule.
#include <vector>

#include "cpu/choose_isa.h"
#include "cpu/cpu.h"

namespace effkern::cpu {
namespace {

// Less work than this is not worth waking a thread for.
constexpr int64_t kGrainElements = 32768;

int64_t elements_of(const StepTask& task) {
  int64_t elements = 0;
  for (int64_t i = 0; i < task.tensors; ++i) elements += task.table[i * kTableColumns + kNumel];
  return elements;
}

int64_t chunks_of(const StepTask& task, int64_t tensor) {
  return (task.table[tensor * kTableColumns + kNumel] + kChunk - 1) / kChunk;
}

int64_t chunks_of(const StepTask& task) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < task.tensors; ++i) chunks += chunks_of(task, i);
  return chunks;
}

}  // namespace

#define EFFKERN_STEP(Rule, name)                                                           \
  void step(const StepTask& task, const Rule& rule, ParallelFor parallel_for) {            \
    const Kernels& kernels = chosen_kernels();                                             \
    in_threads(parallel_for, elements_of(task), kGrainElements,                            \
               [&](int64_t begin, int64_t end) { kernels.name(task, rule, begin, end); }); \
  }
EFFKERN_ONE_PASS_RULES(EFFKERN_STEP)
#undef EFFKERN_STEP

void step(const StepTask& task, const Lamb& rule, ParallelFor parallel_for) {
  const Kernels& kernels = chosen_kernels();
  const int64_t chunks = chunks_of(task);
  // Each chunk's sums have their place, so that the ratio does not depend on the threads.
  std::vector<double> squares(static_cast<size_t>(2 * chunks));
  in_threads(parallel_for, chunks, kGrainElements / kChunk, [&](int64_t begin, int64_t end) {
    kernels.lamb_advance(task, rule, squares.data(), begin, end);
  });
  std::vector<double> ratios;
  const double* of_chunk = squares.data();
  for (int64_t i = 0; i < task.tensors; ++i) {
    double param = 0, direction = 0;
    for (int64_t chunk = 0; chunk < chunks_of(task, i); ++chunk, of_chunk += 2) {
      param += of_chunk[0];
      direction += of_chunk[1];
    }
    ratios.push_back(trust_ratio(param, direction));
  }
  in_threads(parallel_for, elements_of(task), kGrainElements, [&](int64_t begin, int64_t end) {
    kernels.lamb_apply(task, rule, ratios.data(), begin, end);
  });
}

double squares(const StepTask& task, ParallelFor parallel_for) {
  const Kernels& kernels = chosen_kernels();
  const int64_t chunks = chunks_of(task);
  std::vector<double> of_chunk(static_cast<size_t>(chunks));
  in_threads(parallel_for, chunks, kGrainElements / kChunk, [&](int64_t begin, int64_t end) {
    kernels.squares(task, of_chunk.data(), begin, end);
  });
  double total = 0;
  for (const double one : of_chunk) total += one;
  return total;
}

}  // namespace effkern::cpu
