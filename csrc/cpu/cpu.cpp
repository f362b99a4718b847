#include "cpu/cpu.h"

#include "cpu/choose_isa.h"

namespace effkern::cpu {
namespace {

// Less work than this is not worth waking a thread for.
constexpr int64_t kGrainElements = 32768;

int64_t grain_of_rows(int64_t features) {
  return features >= kGrainElements ? 1 : kGrainElements / (features > 0 ? features : 1);
}

const NormKernels& kernels_of(Norm norm) { return chosen_kernels().norms[static_cast<int>(norm)]; }

}  // namespace

void norm_forward(const NormForward& args, ParallelFor parallel_for) {
  const NormKernels& kernels = kernels_of(args.norm);
  in_threads(parallel_for, args.rows, grain_of_rows(args.features),
             [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
}

RowChunks norm_chunks(int64_t rows) {
  constexpr int64_t kMostChunks = 64, kFewestRows = 8;
  const int64_t even = (rows + kMostChunks - 1) / kMostChunks;
  const int64_t chunk = even > kFewestRows ? even : kFewestRows;
  return {chunk, (rows + chunk - 1) / chunk};
}

void norm_backward(const NormBackward& args, void* partial, ParallelFor parallel_for) {
  const NormKernels& kernels = kernels_of(args.norm);
  if (args.sums() == 0) {
    in_threads(parallel_for, args.rows, grain_of_rows(args.features),
               [&](int64_t begin, int64_t end) { kernels.backward(args, 1, nullptr, begin, end); });
    return;
  }
  const RowChunks chunks = norm_chunks(args.rows);
  in_threads(parallel_for, chunks.count, grain_of_rows(args.features * chunks.rows),
             [&](int64_t begin, int64_t end) {
               kernels.backward(args, chunks.rows, partial, begin, end);
             });
  // Whole vectors to each thread: a grain of 1,024 features is a multiple of every vector's lanes.
  constexpr int64_t kFeatureGrain = 1024;
  const int64_t grains = (args.features + kFeatureGrain - 1) / kFeatureGrain;
  in_threads(parallel_for, grains, grain_of_rows(kFeatureGrain * (chunks.count + 1)),
             [&](int64_t begin, int64_t end) {
               const int64_t last =
                   end * kFeatureGrain < args.features ? end * kFeatureGrain : args.features;
               kernels.sum_shares(args, chunks.count, partial, begin * kFeatureGrain, last);
             });
}

void norm_softmax_forward(const NormSoftmaxForward& args, ParallelFor parallel_for) {
  const NormSoftmaxKernels& kernels = chosen_kernels().norm_softmax;
  in_threads(parallel_for, args.rows, grain_of_rows(args.features),
             [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
}

void norm_softmax_backward(const NormSoftmaxBackward& args, ParallelFor parallel_for) {
  const NormSoftmaxKernels& kernels = chosen_kernels().norm_softmax;
  in_threads(parallel_for, args.rows, grain_of_rows(args.features),
             [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

void norm_softmax_cross_entropy(const NormSoftmaxCrossEntropyTask& task, ParallelFor parallel_for) {
  const Kernels& kernels = chosen_kernels();
  in_threads(parallel_for, task.rows, grain_of_rows(task.classes), [&](int64_t begin, int64_t end) {
    kernels.norm_softmax_cross_entropy(task, begin, end);
  });
}

void norm_attention_forward(const NormAttentionForward& args, ParallelFor parallel_for) {
  const NormAttentionKernels& kernels = chosen_kernels().norm_attention;
  in_threads(parallel_for, args.batch * args.key_heads, 1,
             [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
}

void norm_attention_backward(const NormAttentionBackward& args, ParallelFor parallel_for) {
  const NormAttentionKernels& kernels = chosen_kernels().norm_attention;
  in_threads(parallel_for, args.batch * args.key_heads, 1,
             [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

void attention_by_scores_forward(const AttentionByScoresForward& args, ParallelFor parallel_for) {
  const AttentionByScoresKernels& kernels = chosen_kernels().attention_by_scores;
  const int64_t stretches = (args.rows + kAttentionRows - 1) / kAttentionRows;
  in_threads(parallel_for, args.batch * args.heads * stretches, 1,
             [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
}

void attention_by_scores_backward(const AttentionByScoresBackward& args, ParallelFor parallel_for) {
  const AttentionByScoresKernels& kernels = chosen_kernels().attention_by_scores;
  in_threads(parallel_for, args.batch * args.key_heads, 1,
             [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

void bandwidth(const BandwidthTask& task, int64_t elements, ParallelFor parallel_for) {
  const Kernels& kernels = chosen_kernels();
  // Counted in stretches of 64 elements, so that every thread's begins on a cache line.
  in_threads(parallel_for, elements / 64, kGrainElements / 64,
             [&](int64_t begin, int64_t end) { kernels.bandwidth(task, begin * 64, end * 64); });
}

}  // namespace effkern::cpu
