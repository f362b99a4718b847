// What a kernel of a norm of rows is asked to do. Formulas: math/rms_norm.h, crms_norm.h,
// layer_norm.h.
#pragma once

#include "common/dtype.h"
#include "common/rows.h"

namespace effkern {

enum class Norm { kRms, kCrms, kLayer };
constexpr int kNorms = 3;

// How many numbers a row the forward pass keeps for the backward pass: rstd, after the sum or the
// mean where there are two.
constexpr int numbers_of(Norm norm) { return norm == Norm::kRms ? 1 : 2; }

// y = xhat * weight + bias, xhat the norm of total = x + residual rounded to dtype. Without a
// residual, total is x itself and nothing is written for it.
struct NormForward {
  Norm norm;
  DType dtype;         // of x, residual, y and total
  DType weight_dtype;  // of weight and bias; any, the arithmetic is in the accumulation type
  const void* x;
  RowLayout x_rows;
  const void* residual;  // null: no residual
  RowLayout residual_rows;
  const void* weight;  // null: no weight; else contiguous, `features` long
  const void* bias;    // the same; null without a weight
  void* y;             // contiguous rows x features
  void* total;         // contiguous rows x features; null without a residual
  void* statistics;    // numbers_of(norm) x rows, in the accumulation type; null: not wanted (CPU)
  int64_t rows, features;
  double eps;
};

// grad_x from g = grad * weight as the formula says, + grad_total
// grad_weight = sum over rows of grad * xhat
// grad_bias = sum over rows of grad
struct NormBackward {
  Norm norm;
  DType dtype;  // of grad, grad_total, x and grad_x
  DType weight_dtype;
  const void* grad;
  RowLayout grad_rows;
  const void* grad_total;  // null: no gradient arrived through the returned sum
  RowLayout grad_total_rows;
  const void* x;  // what was normalised: the sum, where there was a residual
  RowLayout x_rows;
  bool x_is_y;             // `x` is the forward's y; what was normalised is restored from it
  const void* bias;        // as the forward had it; of use where x_is_y
  const void* weight;      // null: no weight
  const void* statistics;  // contiguous, as forward wrote them
  void* grad_x;            // contiguous rows x features; null: not wanted
  void* grad_weight;       // features, in weight_dtype; null: not wanted
  void* grad_bias;         // the same
  int64_t rows, features;

  // How many sums over all rows are taken for each feature: none, the weight's gradient, or that
  // and the bias's.
  int sums() const { return grad_bias != nullptr ? 2 : grad_weight != nullptr ? 1 : 0; }
};

// A weight smaller than this, times the bias or alone, leaves less than half of a y's digits for
// xhat: sqrt(eps), and the smallest normal number over it.
constexpr double least_beside_bias(DType y) {
  switch (y) {
    case DType::kFloat32:
      return 0x1p-11;
    case DType::kFloat64:
      return 0x1p-26;
    case DType::kBFloat16:
      return 0x1p-3;
    case DType::kFloat16:
      return 0x1p-5;
  }
  return 1;
}
constexpr double least_weight(DType y) {
  switch (y) {
    case DType::kFloat32:
      return 0x1p-115;
    case DType::kFloat64:
      return 0x1p-996;
    case DType::kBFloat16:
      return 0x1p-123;
    case DType::kFloat16:
      return 0x1p-9;
  }
  return 1;
}

}  // namespace effkern
