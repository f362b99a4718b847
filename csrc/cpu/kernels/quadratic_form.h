// q^T M q of rows q, for a matrix M of moments in double precision of which the part on and above
// the diagonal is given. cpu/kernels/isa.h must come first.
//
// Float32 does for a row whose terms do not cancel. They do where M is large in few directions and
// a row is nearly orthogonal to them; it is done again in double precision. Results do not depend
// on other rows.
#pragma once

#include "cpu/kernels/attention_keys.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

template <class S>
class QuadraticForm {
 public:
  QuadraticForm(int64_t features, int64_t stride, Memory& memory)
      : features_(features),
        stride_(stride),
        upper_(memory.take<S>(stride * stride)),
        products_(memory.take<S>(kChunkKeys * stride)),
        wide_upper_(memory.take<double>(stride * stride)),
        wide_q_(memory.take<double>(kChunkKeys * stride)),
        wide_products_(memory.take<double>(kChunkKeys * stride)) {}

  static int64_t doubles(int64_t stride) { return 2 * stride * stride + 3 * kChunkKeys * stride; }

  // `trace` is the sum of the moments' diagonal.
  void set(const double* moments, double trace) {
    trace_ = trace;
    is_wide_ = false;
    // Over the trace, so that no number of S is out of range.
    if (trace > 0) to_upper(moments, 1 / trace, upper_);
  }

  // `count` rows q, at most kChunkKeys, stand `stride` apart. `exact_moments()` is asked for where
  // terms cancel: those that were set may hold the roundings of float32.
  template <class Moments>
  void squares(const S* q, int64_t count, double* squares, const Moments& exact_moments) {
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
      if (cancels(form, q + i * stride_, products_ + i * stride_)) again[found++] = i;
    }
    if (found == 0) return;
    if (!is_wide_) to_upper(exact_moments(), 1, wide_upper_);
    is_wide_ = true;
    in_double(q, again, found, squares);
  }

 private:
  // U with q^T U q = `factor` q^T `moments` q, and zeros below the diagonal, as far as they are
  // read.
  template <class To>
  void to_upper(const double* moments, double factor, To* upper) const {
    for (int64_t a = 0; a < features_; ++a) {
      const double* const from = moments + a * stride_;
      To* const to = upper + a * stride_;
      const int64_t first = a / kTileColumns<float> * kTileColumns<float>;
      for (int64_t b = first; b < stride_; ++b) to[b] = static_cast<To>(from[b] * (2 * factor));
      for (int64_t b = first; b < a; ++b) to[b] = 0;
      to[a] = static_cast<To>(from[a] * factor);
    }
  }

  // Whether rounding shows in a row's form q . p, of M over its trace and p = U q: where it is
  // small beside |q| |p|, terms cancel, in the sum or within p.
  bool cancels(S form, const S* q, const S* p) const {
    if (sizeof(S) == sizeof(double)) return false;
    constexpr S kSmall = S(1e-30);  // below it terms are lost
    const S largest = square_root(dot(q, q, stride_)) * square_root(dot(p, p, stride_));
    return !(form > largest / 4 && form > kSmall);
  }

  void in_double(const S* q, const int64_t* rows, int64_t count, double* squares) {
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
  double trace_ = 0;
  bool is_wide_ = false;
};

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
