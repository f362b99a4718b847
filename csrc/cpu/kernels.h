// The kernels of one instruction set, and the choice among the sets this library was built with.
#pragma once

#include "common/cross_entropy.h"
#include "common/dtype.h"
#include "common/multi_tensor.h"
#include "common/norm.h"
#include "common/norm_attention.h"
#include "common/norm_softmax.h"
#include "math/rules.h"

namespace effkern::cpu {

// One step of some rule over parameters of one dtype. `table` is laid out as common/multi_tensor.h
// says.
struct StepTask {
  DType dtype;  // of parameters and gradients
  Storage storage;
  bool steps_are_double;
  const int64_t* table;
  int64_t tensors;
  double lr;
  double factor;  // gradients are multiplied by it
};

// A pass over memory with `reads` input and `writes` output arrays and next to no arithmetic: the
// limit that a benchmark holds a kernel against.
struct BandwidthTask {
  const float* const* inputs;
  float* const* outputs;
  int64_t reads, writes;
};

// Each function does the stretch [begin, end) of a task: rows, chunks of rows, or elements.
struct NormKernels {
  void (*forward)(const NormForward&, int64_t begin, int64_t end);
  // A chunk is `chunk_rows` rows; `partial`, for each chunk sums() rows of features in the
  // accumulation type, takes each chunk's share of the parameters' gradients (null: none wanted).
  void (*backward)(const NormBackward&, int64_t chunk_rows, void* partial, int64_t begin,
                   int64_t end);
  // Sums the shares of `chunks` chunks into the parameters' gradients for the features
  // [begin, end).
  void (*sum_shares)(const NormBackward&, int64_t chunks, const void* partial, int64_t begin,
                     int64_t end);
};
struct NormSoftmaxKernels {
  void (*forward)(const NormSoftmaxForward&, int64_t begin, int64_t end);
  void (*backward)(const NormSoftmaxBackward&, int64_t begin, int64_t end);
};
struct NormAttentionKernels {
  // Heads of keys are counted through the batch.
  void (*forward)(const NormAttentionForward&, int64_t begin, int64_t end);
  void (*backward)(const NormAttentionBackward&, int64_t begin, int64_t end);
};
// The rows of a head that a thread takes together.
constexpr int64_t kAttentionRows = 192;

struct AttentionByScoresKernels {
  // Stretches of kAttentionRows rows are counted through the heads.
  void (*forward)(const AttentionByScoresForward&, int64_t begin, int64_t end);
  // Heads of keys are counted through the batch.
  void (*backward)(const AttentionByScoresBackward&, int64_t begin, int64_t end);
};
struct Kernels {
  const char* isa;
  NormKernels norms[kNorms];  // by Norm
  NormSoftmaxKernels norm_softmax;
  void (*norm_softmax_cross_entropy)(const NormSoftmaxCrossEntropyTask&, int64_t begin,
                                     int64_t end);
  NormAttentionKernels norm_attention;
  AttentionByScoresKernels attention_by_scores;
  // One step of a rule. Elements are counted through all tensors, in the table's order.
#define EFFKERN_MEMBER_OF(Rule, name) \
  void (*name)(const StepTask&, const Rule&, int64_t begin, int64_t end);
  EFFKERN_ONE_PASS_RULES(EFFKERN_MEMBER_OF)
#undef EFFKERN_MEMBER_OF
  // Chunks of kChunk elements are counted so. `squares` takes the sum of squares of the gradient
  // for each; for LAMB two, of the parameter and of its direction.
  void (*squares)(const StepTask&, double* squares, int64_t begin, int64_t end);
  void (*lamb_advance)(const StepTask&, const Lamb&, double* squares, int64_t begin, int64_t end);
  void (*lamb_apply)(const StepTask&, const Lamb&, const double* ratios, int64_t begin,
                     int64_t end);
  void (*bandwidth)(const BandwidthTask&, int64_t begin, int64_t end);
};

namespace baseline {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}

}  // namespace effkern::cpu
