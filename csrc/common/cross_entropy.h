// What a kernel of NormSoftmax's cross-entropy is asked to do. Formula: math/cross_entropy.h.
#pragma once

#include "common/dtype.h"
#include "common/rows.h"

namespace effkern {

enum class TargetKind {
  kIndices,      // int64, contiguous
  kAsLogits,     // probabilities of the dtype of the logits
  kAccumulated,  // the same of the accumulation type
};

// Of each row: its loss; with gradients, `scale` times the gradient of that.
struct NormSoftmaxCrossEntropyTask {
  DType dtype;  // of logits and grad
  TargetKind target_kind;
  const void* logits;
  RowLayout logits_rows;
  const void* target;
  RowLayout target_rows;  // of probabilities
  const void* weight;     // of each class, in the accumulation type; null: 1
  const void* tau;        // one number of the accumulation type, or null: it is tau_value
  double tau_value, eps, label_smoothing;
  int64_t ignore_index;
  const void* scale;     // numbers of the accumulation type; null: no gradient is wanted
  int64_t scale_stride;  // 1: one for each row; 0: one for all
  void* loss;            // one number for each row, in the accumulation type
  void* grad;            // contiguous rows x classes, or where the logits are; null: not wanted
  RowLayout grad_rows;
  void* grad_tau;  // one number for each row, in the accumulation type; null: not wanted
  int64_t rows, classes;
};

}  // namespace effkern
