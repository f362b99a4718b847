// What an RMSNorm kernel is asked to do. Formulas: math/rms_norm.h.
#pragma once

#include "common/dtype.h"
#include "common/rows.h"

namespace effkern {

// y = total * rstd * weight, rstd = 1 / sqrt(mean(total^2) + eps), total = x + residual rounded to
// dtype. Without a residual, total is x itself and nothing is written for it.
struct RmsNormForward {
  DType dtype;         // of x, residual, y and total
  DType weight_dtype;  // any; the product is taken in the accumulation type
  const void* x;
  RowLayout x_rows;
  const void* residual;  // null: no residual
  RowLayout residual_rows;
  const void* weight;  // null: no weight; else contiguous, `features` long
  void* y;             // contiguous rows x features
  void* total;         // contiguous rows x features; null without a residual
  void* rstd;          // rows, in the accumulation type
  int64_t rows, features;
  double eps;
};

// grad_x = weight * grad * rstd - x * rstd^3 * mean(weight * grad * x) [+ grad_total]
// grad_weight = sum over rows of grad * x * rstd
struct RmsNormBackward {
  DType dtype;  // of grad, grad_total, x and grad_x
  DType weight_dtype;
  const void* grad;
  RowLayout grad_rows;
  const void* grad_total;  // null: no gradient arrived through the returned sum
  RowLayout grad_total_rows;
  const void* x;  // what was normalised: the sum, where there was a residual
  RowLayout x_rows;
  const void* weight;  // null: no weight
  const void* rstd;    // contiguous, accumulation type
  void* grad_x;        // contiguous rows x features; null: not wanted
  void* grad_weight;   // features, in weight_dtype; null: not wanted
  int64_t rows, features;
};

}  // namespace effkern
