// q^T M q of many rows q, for a matrix M of moments in double precision of which the part on and
// above the diagonal is given. cpu/kernels/isa.h must come first.
//
// Where q is nearly orthogonal to the directions in which M is large, large terms cancel in the sum
// over M's elements, and float32 is too narrow for them. There are two ways around that.
#pragma once

#include "cpu/kernels/attention_keys.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// |q|^2 in double precision.
template <class S>
EFFKERN_INLINE double squared_length(const S* q, int64_t stride) {
  Doubles sums[kParts<S>] = {}, x[kParts<S>];
  for (int64_t i = 0; i < stride; i += kLanes<S>) {
    widen(load(q + i), x);
    for (int64_t part = 0; part < kParts<S>; ++part) sums[part] += x[part] * x[part];
  }
  for (int64_t part = 1; part < kParts<S>; ++part) sums[0] += sums[part];
  return sum_lanes(sums[0]);
}

// By M = U U^T, U upper triangular: |U^T q|^2 is a sum of squares, and a rounding of U moves its
// root by no more than a rounding of the keys would. For many rows of one M.
template <class S>
class FactoredForm {
 public:
  FactoredForm(int64_t features, int64_t stride, Memory& memory)
      : features_(features),
        stride_(stride),
        work_(memory.take<double>(stride * stride)),
        column_(memory.take<double>(stride)),
        factor_(memory.take<S>(stride * stride)),
        products_(memory.take<S>(kChunkKeys * stride)) {}

  static int64_t doubles(int64_t stride) {
    return 2 * stride * stride + kChunkKeys * stride + stride + 8;
  }

  void set(const double* moments) {
    __builtin_memcpy(work_, moments, static_cast<size_t>(stride_ * stride_) * sizeof(double));
    for (int64_t k = features_; k-- > 0;) {
      // What is left of a direction that other directions explain is rounding, and no part of it.
      constexpr double kRounding = 0x1p-48;
      const double pivot = work_[k * stride_ + k];
      const bool is_left = pivot > kRounding * moments[k * stride_ + k];
      const double inverse = is_left ? 1 / square_root(pivot) : 0;
      clear(column_, stride_);
      for (int64_t a = 0; a <= k; ++a) {
        column_[a] = work_[a * stride_ + k] * inverse;
        work_[a * stride_ + k] = column_[a];
      }
      column_[k] = 0;
      if (is_left) take_off_column(k);
      for (int64_t b = 0; b < k; ++b) work_[k * stride_ + b] = 0;
    }
    convert(work_, stride_ * stride_, factor_);
  }

  // Rows q (at most kChunkKeys) stand `stride` apart.
  void squares(const S* q, int64_t count, double* squares) {
    multiply<Part::kUpperRight, Onto::kNothing, S>(whole(count, kTileRows), stride_, features_,
                                                   {q, stride_, 1}, factor_, stride_, products_,
                                                   stride_);
    for (int64_t i = 0; i < count; ++i) {
      squares[i] = squared_length(products_ + i * stride_, stride_);
    }
  }

 private:
  void take_off_column(int64_t k) {
    for (int64_t a = 0; a < k; ++a) {
      double* const row = work_ + a * stride_;
      const double factor = column_[a];
      for (int64_t b = a / kLanes<double> * kLanes<double>; b < k; b += kLanes<double>) {
        store(row + b, load(row + b) - factor * load(column_ + b));
      }
    }
  }

  int64_t features_, stride_;
  double *work_, *column_;
  S *factor_, *products_;
};

// By M itself, for few rows of each M: in S where the terms do not cancel, and the rows where they
// do once more in double precision.
template <class S>
class DirectForm {
 public:
  DirectForm(int64_t features, int64_t stride, Memory& memory)
      : features_(features),
        stride_(stride),
        upper_(memory.take<S>(stride * stride)),
        products_(memory.take<S>(kChunkKeys * stride)),
        wide_upper_(memory.take<double>(stride * stride)),
        wide_q_(memory.take<double>(kChunkKeys * stride)),
        wide_products_(memory.take<double>(kChunkKeys * stride)) {}

  static int64_t doubles(int64_t stride) { return 2 * stride * stride + 3 * kChunkKeys * stride; }

  // `moments` must stay; `trace` is the sum of their diagonal.
  void set(const double* moments, double trace) {
    moments_ = moments, trace_ = trace;
    is_wide_ = false;
    // Over the trace, so that no number of S is out of range.
    if (trace > 0) to_upper(1 / trace, upper_);
  }

  // As FactoredForm has it.
  void squares(const S* q, int64_t count, double* squares) {
    if (!(trace_ > 0)) {
      for (int64_t i = 0; i < count; ++i) squares[i] = 0;
      return;
    }
    multiply<Part::kUpperRight, Onto::kNothing, S>(whole(count, kTileRows), stride_, features_,
                                                   {q, stride_, 1}, upper_, stride_, products_,
                                                   stride_);
    int64_t again[kChunkKeys], found = 0;
    for (int64_t i = 0; i < count; ++i) {
      const S form = dot(q + i * stride_, products_ + i * stride_, stride_);
      squares[i] = form * trace_;
      if (cancels(form, q + i * stride_)) again[found++] = i;
    }
    if (found > 0) in_double(q, again, found, squares);
  }

 private:
  // U with q^T U q = `factor` q^T M q, and zeros below the diagonal, as far as they are read.
  template <class To>
  void to_upper(double factor, To* upper) const {
    for (int64_t a = 0; a < features_; ++a) {
      const double* const from = moments_ + a * stride_;
      To* const to = upper + a * stride_;
      const int64_t first = a / kTileColumns<float> * kTileColumns<float>;
      for (int64_t b = first; b < stride_; ++b) to[b] = static_cast<To>(from[b] * (2 * factor));
      for (int64_t b = first; b < a; ++b) to[b] = 0;
      to[a] = static_cast<To>(from[a] * factor);
    }
  }

  // The form is of M over its trace.
  bool cancels(S form, const S* q) const {
    if (sizeof(S) == sizeof(double)) return false;
    constexpr S kLeast = S(1) / 256, kSmall = S(1e-30);
    const S length = dot(q, q, stride_);
    return !(form > kLeast * length && form > kSmall);
  }

  void in_double(const S* q, const int64_t* rows, int64_t count, double* squares) {
    if (!is_wide_) to_upper(1, wide_upper_);
    is_wide_ = true;
    const int64_t tiles = whole(count, kTileRows);
    for (int64_t i = 0; i < tiles; ++i) {
      convert(q + rows[least(i, count - 1)] * stride_, stride_, wide_q_ + i * stride_);
    }
    multiply<Part::kUpperRight, Onto::kNothing, double>(tiles, stride_, features_,
                                                        {wide_q_, stride_, 1}, wide_upper_, stride_,
                                                        wide_products_, stride_);
    for (int64_t i = 0; i < count; ++i) {
      const double form = dot(wide_q_ + i * stride_, wide_products_ + i * stride_, stride_);
      squares[rows[i]] = form > 0 ? form : 0;
    }
  }

  int64_t features_, stride_;
  S *upper_, *products_;
  double *wide_upper_, *wide_q_, *wide_products_;
  const double* moments_ = nullptr;
  double trace_ = 0;
  bool is_wide_ = false;
};

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
