// The CPU's kernels as a caller sees them: whole tasks, split over threads that the caller
// provides. No torch header is needed here or below, so these sources build as a plain static
// library too.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace effkern::cpu {

// Runs body(begin, end, context) over [0, total) in stretches of at least `grain`, in any number of
// threads. torch_parallel_for has this form; so the kernels share PyTorch's threads and keep none
// of their own.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t total, int64_t grain, Body body, void* context);

// Calls work(begin, end) so; what fits one grain runs right here.
template <class Work>
void in_threads(ParallelFor parallel_for, int64_t total, int64_t grain, const Work& work) {
  if (total <= grain) {
    if (total > 0) work(int64_t{0}, total);
    return;
  }
  parallel_for(
      total, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Work*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&work)));
}

void norm_forward(const NormForward& args, ParallelFor parallel_for);

// How the rows are cut to sum the parameters' gradients. It depends on the shape alone, so that the
// sums do too.
struct RowChunks {
  int64_t rows;   // in each chunk but the last
  int64_t count;  // of chunks
};
RowChunks norm_chunks(int64_t rows);

// `partial` has room for count x sums() x features numbers of the accumulation type where gradients
// of parameters are wanted, else null.
void norm_backward(const NormBackward& args, void* partial, ParallelFor parallel_for);

void norm_softmax_forward(const NormSoftmaxForward& args, ParallelFor parallel_for);
void norm_softmax_backward(const NormSoftmaxBackward& args, ParallelFor parallel_for);
void norm_softmax_cross_entropy(const NormSoftmaxCrossEntropyTask& task, ParallelFor parallel_for);

// A thread does whole heads of keys, with all heads of queries that go with them.
void norm_attention_forward(const NormAttentionForward& args, ParallelFor parallel_for);
void norm_attention_backward(const NormAttentionBackward& args, ParallelFor parallel_for);
void attention_by_scores_forward(const AttentionByScoresForward& args, ParallelFor parallel_for);
void attention_by_scores_backward(const AttentionByScoresBackward& args, ParallelFor parallel_for);

// One step of a rule over all tensors of a table; their step counters have been increased.
#define EFFKERN_DECLARE(Rule, name) \
  void step(const StepTask& task, const Rule& rule, ParallelFor parallel_for);
EFFKERN_ONE_PASS_RULES(EFFKERN_DECLARE)
#undef EFFKERN_DECLARE
void step(const StepTask& task, const Lamb& rule, ParallelFor parallel_for);

// The sum of squares of all gradients of a table.
double squares(const StepTask& task, ParallelFor parallel_for);

void bandwidth(const BandwidthTask& task, int64_t elements, ParallelFor parallel_for);

// The instruction set in use: the widest the machine has, or the one that EFFKERN_ISA named at
// load.
const char* isa();
// Chooses "baseline", "avx2" or "avx512"; false where the library or the machine lacks it.
bool set_isa(const char* name);

}  // namespace effkern::cpu
