// NormSoftmax's cross-entropy, a row at a time: its loss, and its gradient, in place of the row
// where that is asked for. The first pass over a row brings it into a cache near by and the others
// find it there, so each byte of memory is read once and written once.
// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/softmax_row.h"
// clang-format on
#include "common/cross_entropy.h"
#include "math/cross_entropy.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// The storage type of probabilities where there are class indices instead.
struct NoProbabilities {};

// The coefficients of the classes, but for what a class index adds to its own.
template <class T, class Q, bool kWeighted>
struct Coefficients {
  using S = Acc<T>;
  const Q* probabilities;
  const S* weight;
  S share, uniform;  // of the target, and of every class alike

  EFFKERN_MEMBER Vec<T> at(int64_t i, int64_t count) const {
    Vec<T> a = Vec<T>{} + uniform;
    if constexpr (!std::is_same_v<Q, NoProbabilities>) {
      a += load_some(probabilities + i, count) * share;
    }
    return weighted(a, i, count);
  }

 private:
  EFFKERN_MEMBER Vec<T> weighted(Vec<T> a, int64_t i, int64_t count) const {
    if constexpr (kWeighted) return a * load_some(weight + i, count);
    return a;
  }
};

template <class T, class Q, bool kWeighted>
void rows(const NormSoftmaxCrossEntropyTask& task, int64_t begin, int64_t end) {
  using S = Acc<T>;
  using V = Vec<T>;
  constexpr bool kIndices = std::is_same_v<Q, NoProbabilities>;
  constexpr bool kPlain = kIndices && !kWeighted;  // coefficients that need no sum
  using Sums = CrossEntropySums<V>;
  const int64_t classes = task.classes;
  const S tau = task.tau ? *static_cast<const S*>(task.tau) : static_cast<S>(task.tau_value);
  const S* const weight = static_cast<const S*>(task.weight);
  const S* const scale = static_cast<const S*>(task.scale);
  S* const loss = static_cast<S*>(task.loss);
  S* const grad_tau = static_cast<S*>(task.grad_tau);
  Coefficients<T, Q, kWeighted> coefficients{
      nullptr, weight, static_cast<S>(1 - task.label_smoothing),
      static_cast<S>(task.label_smoothing / static_cast<double>(classes))};

  for (int64_t number = begin; number < end; ++number) {
    const T* const x = static_cast<const T*>(task.logits) + row_offset(task.logits_rows, number);
    T* const grad =
        task.grad ? static_cast<T*>(task.grad) + row_offset(task.grad_rows, number) : nullptr;
    int64_t target = 0;
    if constexpr (kIndices) {
      target = static_cast<const int64_t*>(task.target)[number];
      if (target == task.ignore_index) {
        loss[number] = 0;
        if (grad) __builtin_memset(grad, 0, static_cast<size_t>(classes) * sizeof(T));
        if (grad_tau) grad_tau[number] = 0;
        continue;
      }
    } else {
      coefficients.probabilities =
          static_cast<const Q*>(task.target) + row_offset(task.target_rows, number);
    }

    const SoftmaxRow<T, NoMask> row(x, {}, classes, tau, static_cast<S>(task.eps));
    const S largest = row.origin(), inverse = S(1) / row.divisor().value;
    const auto merge = [](const Sums& a, const Sums& b) EFFKERN_LAMBDA {
      return Sums{a.e + b.e, a.ed + b.ed, a.a + b.a, a.ad + b.ad};
    };
    const auto add = [&](Sums& sums, int64_t i, int64_t count) EFFKERN_LAMBDA {
      const V e = row.exponentials(i, count), d = row.less(largest, i, count);
      sums.e += e;
      sums.ed += e * d;
      if constexpr (!kPlain) {
        const V a = row.inside(coefficients.at(i, count), i, count);
        sums.a += a;
        sums.ad += a * d;
      }
    };
    const Sums all = over_row<T>(classes, Sums{}, merge, add);
    CrossEntropySums<S> sums{sum_lanes(all.e), sum_lanes(all.ed), sum_lanes(all.a),
                             sum_lanes(all.ad)};
    if constexpr (kPlain) {
      const S smoothing = static_cast<S>(task.label_smoothing);
      sums.a = smoothing;
      sums.ad = smoothing * (row.mean() - largest);
    }
    S on_target = 0;
    if constexpr (kIndices) {
      on_target = kWeighted ? coefficients.share * weight[target] : coefficients.share;
      sums.a += on_target;
      sums.ad += on_target * (load_first(x + target, 1)[0] - largest);
    }
    loss[number] = cross_entropy(sums, inverse);
    if (!scale) continue;

    const S row_scale = scale[number * task.scale_stride];
    const S along = cross_entropy_along(sums);
    if (grad_tau) grad_tau[number] = row_scale * softmax_grad_tau(along, tau, row.divisor());
    if (!grad) continue;
    const SoftmaxGradient<S> gradient{0, 0, inverse * row_scale,
                                      softmax_on_c(along, row.squares(), row.divisor())};
    const S factor = sums.a / sums.e;
    const auto grad_at = [&](int64_t i, int64_t count, S more) EFFKERN_LAMBDA {
      const V a = coefficients.at(i, count) + more;
      const V dz = cross_entropy_grad_logit(row.exponentials(i, count), a, factor);
      return softmax_grad_x(dz, row.centred(i, count), gradient);
    };
    // The target's own, before the row is overwritten.
    V of_target = {};
    if constexpr (kIndices) of_target = grad_at(target, 1, on_target);
    for_each_vector<T>(classes, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
      store_some(grad + i, grad_at(i, count, S(0)), count);
    });
    if constexpr (kIndices) store_some(grad + target, of_target, 1);
  }
}

template <class T>
void rows_of(const NormSoftmaxCrossEntropyTask& task, int64_t begin, int64_t end) {
  const auto with_target = [&](auto probabilities) {
    using Q = decltype(probabilities);
    task.weight ? rows<T, Q, true>(task, begin, end) : rows<T, Q, false>(task, begin, end);
  };
  switch (task.target_kind) {
    case TargetKind::kIndices:
      return with_target(NoProbabilities{});
    case TargetKind::kAsLogits:
      return with_target(T{});
    case TargetKind::kAccumulated:
      return with_target(Acc<T>{});
  }
}

}  // namespace

void norm_softmax_cross_entropy(const NormSoftmaxCrossEntropyTask& task, int64_t begin,
                                int64_t end) {
  switch (task.dtype) {
    case DType::kFloat32:
      return rows_of<float>(task, begin, end);
    case DType::kFloat64:
      return rows_of<double>(task, begin, end);
    case DType::kBFloat16:
      return rows_of<BFloat16>(task, begin, end);
    case DType::kFloat16:
      return rows_of<Float16>(task, begin, end);
  }
}

}  // namespace effkern::cpu::EFFKERN_ISA
