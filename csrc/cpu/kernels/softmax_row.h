// A row of NormSoftmax: its vectors with their masks, and what is found of it in several passes, of
// which the first brings it into the nearest cache. cpu/kernels/isa.h must come first.
#pragma once

#include <limits>

#include "cpu/exponential.h"
#include "cpu/kernels/rows.h"
#include "math/norm_softmax.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// The storage type of a mask that is not there.
struct NoMask {};

// Lanes that are on or off.
template <class T>
using Lanes = typename ExponentialOf<Vec<T>>::Bits;

template <class T>
EFFKERN_INLINE Lanes<T> lanes_below(int64_t count) {
  Lanes<T> index = {};
  for (int64_t i = 0; i < kLanes<T>; ++i) index[i] = static_cast<decltype(index[0] + 0)>(i);
  return index < static_cast<decltype(index[0] + 0)>(count);
}

// Which of `count` entries of a row are visible, and what is added to their logits.
template <class T>
struct Masked {
  Lanes<T> visible;
  Vec<T> bias;
};

// Where a bool is true.
template <class T>
EFFKERN_INLINE Lanes<T> load_bools(const uint8_t* p, int64_t count) {
  uint8_t bytes[kLanes<T>] = {};
  if (count == kLanes<T>) {
    __builtin_memcpy(bytes, p, sizeof(bytes));
  } else {
    __builtin_memcpy(bytes, p, static_cast<size_t>(count));
  }
  Lanes<T> wide = {};
  if constexpr (sizeof(Acc<T>) == 4) {
    wide = load_codes(bytes);
  } else {
    for (int64_t i = 0; i < kLanes<T>; ++i) wide[i] = bytes[i];
  }
  return wide != 0;
}

// The row of a mask of type M: NoMask, uint8_t (a bool) or a floating type.
template <class T, class M>
struct RowMask {
  static constexpr bool kHides = !std::is_same_v<M, NoMask>;
  static constexpr bool kAdds = kHides && !std::is_same_v<M, uint8_t>;
  const M* row;
  Acc<T> hidden;

  EFFKERN_MEMBER Masked<T> at(int64_t i, int64_t count) const {
    Masked<T> mask = {~Lanes<T>{}, {}};
    if (!kHides || count < kLanes<T>) mask.visible = lanes_below<T>(count);
    if constexpr (kAdds) {
      mask.bias = load_some(row + i, count);
      mask.visible &= ~(mask.bias <= hidden);
    } else if constexpr (kHides) {
      mask.visible &= load_bools<T>(row + i, count);
    }
    return mask;
  }
};

// The sum of exponentials of which the largest is 1: in float64, or it would lose of the small ones
// whatever falls below the last digit of that.
template <class V>
struct ExponentialSum {
  Doubles low, high;

  EFFKERN_MEMBER void add(Floats e) {
    const DoublesPair wide = widened(e);
    low += wide.low;
    high += wide.high;
  }
  EFFKERN_MEMBER static ExponentialSum merged(const ExponentialSum& a, const ExponentialSum& b) {
    return {a.low + b.low, a.high + b.high};
  }
  EFFKERN_MEMBER double total() const { return sum_lanes(low + high); }
};
template <>
struct ExponentialSum<Doubles> {
  Doubles all;

  EFFKERN_MEMBER void add(Doubles e) { all += e; }
  EFFKERN_MEMBER static ExponentialSum merged(const ExponentialSum& a, const ExponentialSum& b) {
    return {a.all + b.all};
  }
  EFFKERN_MEMBER double total() const { return sum_lanes(all); }
};

// Everything that both passes need of a row.
template <class T, class M>
class SoftmaxRow {
 public:
  using S = Acc<T>;
  using V = Vec<T>;
  using Mask = RowMask<T, M>;

  SoftmaxRow(const T* x, const Mask& mask, int64_t features, S tau, S eps)
      : x_(x), mask_(mask), features_(features) {
    find_mean();
    if (count_ == 0) return;
    find_squares();
    divisor_ = softmax_divisor(squares_, static_cast<S>(count_), tau, eps);
    inverse_ = S(1) / divisor_.value;
    if constexpr (Mask::kAdds) find_top();
  }

  int64_t visible() const { return count_; }
  S mean() const { return mean_ + shift_; }
  S squares() const { return squares_; }
  S origin() const { return origin_; }  // without biases the largest number
  SoftmaxDivisor<S> divisor() const { return divisor_; }

  // Of the vector at i: e, the distribution up to a factor; 0 at hidden entries and past the end.
  EFFKERN_MEMBER V exponentials(int64_t i, int64_t count) const {
    const Masked<T> mask = mask_.at(i, count);
    V z = logits(i, count, mask);
    if constexpr (Mask::kAdds) z -= top_;
    return mask.visible ? exponential(z) : V{};
  }
  // x - mean; 0 where exponentials are. The mean is that of numbers that may lie far from zero
  // beside their deviations: what rounding left of it is taken off after.
  EFFKERN_MEMBER V centred(int64_t i, int64_t count) const {
    return inside((load_some(x_ + i, count) - mean_) - shift_, i, count);
  }
  // x less a number, and any vector; 0 where exponentials are.
  EFFKERN_MEMBER V less(S number, int64_t i, int64_t count) const {
    return inside(load_some(x_ + i, count) - number, i, count);
  }
  EFFKERN_MEMBER V inside(V v, int64_t i, int64_t count) const {
    return mask_.at(i, count).visible ? v : V{};
  }
  // Another row's vector, 0 where exponentials are.
  EFFKERN_MEMBER V visible_of(const T* row, int64_t i, int64_t count) const {
    return inside(load_some(row + i, count), i, count);
  }

 private:
  struct First {
    V sum, largest;
    Lanes<T> count;
  };
  struct Second {
    V squares, plain;
  };
  static constexpr S kLowest = -std::numeric_limits<S>::infinity();

  EFFKERN_MEMBER V logits(int64_t i, int64_t count, const Masked<T>& mask) const {
    const V z = normalised_logit(load_some(x_ + i, count), origin_, inverse_);
    return Mask::kAdds ? z + mask.bias : z;
  }

  void find_mean() {
    const auto merge = [](const First& a, const First& b) EFFKERN_LAMBDA {
      return First{a.sum + b.sum, larger(a.largest, b.largest), a.count + b.count};
    };
    const auto add = [&](First& all, int64_t i, int64_t count) EFFKERN_LAMBDA {
      const V x = load_some(x_ + i, count);
      const Lanes<T> visible = mask_.at(i, count).visible;
      all.sum += visible ? x : V{};
      all.largest = larger(all.largest, visible ? x : V{} + kLowest);
      all.count -= visible;
    };
    const First all = over_row<T>(features_, First{{}, V{} + kLowest, {}}, merge, add);
    count_ = Mask::kHides ? sum_lanes(all.count) : features_;
    mean_ = sum_lanes(all.sum) / static_cast<S>(count_);
    origin_ = Mask::kAdds ? mean_ : largest_lane(all.largest);
  }

  void find_squares() {
    const auto merge = [](const Second& a, const Second& b) EFFKERN_LAMBDA {
      return Second{a.squares + b.squares, a.plain + b.plain};
    };
    const auto add = [&](Second& all, int64_t i, int64_t count) EFFKERN_LAMBDA {
      const V c = centred(i, count);
      all.squares += c * c;
      all.plain += c;
    };
    const Second all = over_row<T>(features_, Second{}, merge, add);
    // The rounding of the mean, found beside numbers that are small where all are alike.
    const S plain = sum_lanes(all.plain);
    shift_ = plain / static_cast<S>(count_);
    squares_ = larger(sum_lanes(all.squares) - plain * shift_, S(0));
  }

  // With biases, the largest logit is not that of the largest number.
  void find_top() {
    origin_ = mean_;
    const auto merge = [](V a, V b) EFFKERN_LAMBDA { return larger(a, b); };
    const auto add = [&](V& all, int64_t i, int64_t count) EFFKERN_LAMBDA {
      const Masked<T> mask = mask_.at(i, count);
      all = larger(all, mask.visible ? logits(i, count, mask) : V{} + kLowest);
    };
    top_ = largest_lane(over_row<T>(features_, V{} + kLowest, merge, add));
  }

  const T* x_;
  Mask mask_;
  int64_t features_, count_ = 0;
  S mean_, shift_ = 0, squares_ = 0, origin_, top_ = 0, inverse_ = 0;
  SoftmaxDivisor<S> divisor_ = {};
};

// Writes a row's exponentials, which may be where the row is. Times what is returned they are its
// distribution.
template <class T, class M>
EFFKERN_INLINE Acc<T> write_exponentials(const SoftmaxRow<T, M>& row, int64_t features,
                                         Acc<T>* exponentials) {
  using Sum = ExponentialSum<Vec<T>>;
  const auto merge = [](const Sum& a, const Sum& b) EFFKERN_LAMBDA { return Sum::merged(a, b); };
  const auto add = [&](Sum& sum, int64_t i, int64_t count) EFFKERN_LAMBDA {
    const Vec<T> e = row.exponentials(i, count);
    store_some(exponentials + i, e, count);
    sum.add(e);
  };
  return static_cast<Acc<T>>(1 / over_row<T>(features, Sum{}, merge, add).total());
}

// The gradient of a row that has a visible entry.
template <class T, class M>
class SoftmaxRowGradient {
 public:
  using S = Acc<T>;
  using V = Vec<T>;

  // Writes the row's exponentials.
  SoftmaxRowGradient(const SoftmaxRow<T, M>& row, int64_t features, const T* grad, S* exponentials,
                     bool wants_tau)
      : row_(row), grad_(grad), exponentials_(exponentials) {
    struct Sums {
      ExponentialSum<V> e;
      V eg;
    };
    const auto merge_sums = [](const Sums& a, const Sums& b) EFFKERN_LAMBDA {
      return Sums{ExponentialSum<V>::merged(a.e, b.e), a.eg + b.eg};
    };
    const auto add_sums = [&](Sums& sums, int64_t i, int64_t count) EFFKERN_LAMBDA {
      const V e = row.exponentials(i, count);
      store_some(exponentials + i, e, count);
      sums.e.add(e);
      sums.eg += e * row.visible_of(grad, i, count);
    };
    const Sums sums = over_row<T>(features, Sums{}, merge_sums, add_sums);
    gradient_.factor = static_cast<S>(1 / sums.e.total());
    gradient_.mean_g = sum_lanes(sums.eg) * gradient_.factor;
    gradient_.inverse = S(1) / row.divisor().value;
    if (!row.divisor().is_sigma && !wants_tau) return;
    const auto merge = [](V a, V b) EFFKERN_LAMBDA { return a + b; };
    const auto add = [&](V& sum, int64_t i, int64_t count)
                         EFFKERN_LAMBDA { sum += logit(i, count) * row.centred(i, count); };
    along_ = sum_lanes(over_row<T>(features, V{}, merge, add));
    gradient_.on_c = softmax_on_c(along_, row.squares(), row.divisor());
  }

  S factor() const { return gradient_.factor; }  // the distribution is this times an exponential
  S of_tau(S tau) const { return softmax_grad_tau(along_, tau, row_.divisor()); }
  EFFKERN_MEMBER V at(int64_t i, int64_t count) const {
    return softmax_grad_x(logit(i, count), row_.centred(i, count), gradient_);
  }

 private:
  EFFKERN_MEMBER V logit(int64_t i, int64_t count) const {
    const V e = load_some(exponentials_ + i, count);
    return softmax_grad_logit(e, row_.visible_of(grad_, i, count), gradient_);
  }

  const SoftmaxRow<T, M>& row_;
  const T* grad_;
  const S* exponentials_;
  SoftmaxGradient<S> gradient_{};
  S along_ = 0;
};

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
