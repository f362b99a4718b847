// What a kernel of NormSoftmax is asked to do. Formula: math/norm_softmax.h.
#pragma once

#include "common/dtype.h"
#include "common/rows.h"

namespace effkern {

// How entries are hidden, and what is added to the others.
enum class MaskKind {
  kNone,
  kBool,         // one byte each: takes part where it is not 0
  kAsInput,      // additive, of x's dtype
  kAccumulated,  // additive, of the accumulation type
};
constexpr int kMaskKinds = 4;

// A tensor as rows, where the elements of a row may be strided too. A broadcast dimension has
// stride 0.
struct StridedRows {
  RowLayout rows;
  int64_t stride;  // from one element of a row to the next
};

struct NormSoftmaxTask {
  DType dtype;  // of x, y and gradients
  MaskKind mask_kind;
  double mask_hidden;  // an additive mask hides what is at or below this number
  const void* x;
  StridedRows x_rows;
  const void* mask;  // null: none
  StridedRows mask_rows;
  const void* tau;  // one number of the accumulation type, or null: it is tau_value
  double tau_value, eps;
  int64_t rows, features;
};

struct NormSoftmaxForward : NormSoftmaxTask {
  void* y;
  StridedRows y_rows;
};

struct NormSoftmaxBackward : NormSoftmaxTask {
  const void* grad;
  StridedRows grad_rows;
  void* grad_x;  // null: not wanted
  StridedRows grad_x_rows;
  void* grad_tau;  // each row's share, in the accumulation type; null: not wanted
};

}  // namespace effkern
