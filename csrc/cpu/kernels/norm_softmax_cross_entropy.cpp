// NormSoftmax's cross-entropy, a row at a time: its loss, and its gradient, in place of the row
// where that is asked for. The first pass over a row brings it into a cache near by and the others
// find it there, so each byte of memory is read once and written once.
// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/softmax_row.h"
#include "cpu/kernels/strided.h"
// clang-format on
#include "common/cross_entropy.h"
#include "math/cross_entropy.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

StridedRows contiguous(const RowLayout& rows) { return {rows, 1}; }

// The coefficients of the classes, but for what a class index adds to its own. Where they are alike
// for all classes and rows there is no need for a row of them.
template <class S>
class Coefficients {
 public:
  explicit Coefficients(const NormSoftmaxCrossEntropyTask& task)
      : has_indices_(task.target_kind == TargetKind::kIndices),
        probabilities_(
            has_indices_ ? nullptr : task.target,
            task.target_kind == TargetKind::kAsLogits ? task.dtype : accumulation_of(task.dtype),
            contiguous(task.target_rows), task.classes),
        weight_(static_cast<const S*>(task.weight)),
        share_(static_cast<S>(1 - task.label_smoothing)),
        uniform_(static_cast<S>(task.label_smoothing / static_cast<double>(task.classes))),
        classes_(task.classes),
        row_(is_plain() ? 0 : task.classes) {
    if (has_indices_ && !is_plain()) fill(nullptr);
  }

  bool is_plain() const { return has_indices_ && !weight_; }
  S uniform() const { return uniform_; }
  S on_target(int64_t target) const { return weight_ ? share_ * weight_[target] : share_; }
  // Of a row; null where is_plain.
  const S* read(int64_t row) {
    if (!has_indices_) {
      probabilities_.read(row, 1);
      fill(probabilities_[0]);
    }
    return row_.data();
  }

 private:
  void fill(const S* probabilities) {
    for_each_vector<S>(classes_, [&](int64_t i, int64_t count, int) {
      Vec<S> a = Vec<S>{} + uniform_;
      if (probabilities) a += load_some(probabilities + i, count) * share_;
      if (weight_) a *= load_some(weight_ + i, count);
      store_some(row_.data() + i, a, count);
    });
  }

  bool has_indices_;
  RowsIn<S> probabilities_;
  const S* weight_;
  S share_, uniform_;
  int64_t classes_;
  Buffer<S> row_;
};

template <class S, bool kPlain>
void rows(const NormSoftmaxCrossEntropyTask& task, int64_t begin, int64_t end) {
  using V = Vec<S>;
  struct Sums {
    ExponentialSum<V> e;
    V ed, a, ad;  // see CrossEntropySums
  };
  const int64_t classes = task.classes;
  const S tau = task.tau ? *static_cast<const S*>(task.tau) : static_cast<S>(task.tau_value);
  const S* const scale = static_cast<const S*>(task.scale);
  S* const loss = static_cast<S*>(task.loss);
  S* const grad_tau = static_cast<S*>(task.grad_tau);
  const int64_t* const targets =
      task.target_kind == TargetKind::kIndices ? static_cast<const int64_t*>(task.target) : nullptr;
  RowsIn<S> logits(task.logits, task.dtype, contiguous(task.logits_rows), classes);
  RowsOut<S> grads(task.grad, task.dtype, contiguous(task.grad_rows), classes);
  Coefficients<S> coefficients(task);

  for (int64_t number = begin; number < end; ++number) {
    const int64_t target = targets ? targets[number] : 0;
    grads.begin(number);
    S* const grad = grads[0];
    if (targets && target == task.ignore_index) {
      loss[number] = 0;
      if (grad_tau) grad_tau[number] = 0;
      if (grad) __builtin_memset(grad, 0, static_cast<size_t>(classes) * sizeof(S));
      grads.write(1);
      continue;
    }
    logits.read(number, 1);
    const S* const x = logits[0];
    const S* const a_row = coefficients.read(number);
    const auto a_at = [&](int64_t i, int64_t count) EFFKERN_LAMBDA {
      return kPlain ? V{} + coefficients.uniform() : load_some(a_row + i, count);
    };

    const SoftmaxRow<S, NoMask> row(x, {}, classes, tau, static_cast<S>(task.eps));
    const S largest = row.origin(), inverse = S(1) / row.divisor().value;
    const auto merge = [](const Sums& a, const Sums& b) EFFKERN_LAMBDA {
      return Sums{ExponentialSum<V>::merged(a.e, b.e), a.ed + b.ed, a.a + b.a, a.ad + b.ad};
    };
    const auto add = [&](Sums& sums, int64_t i, int64_t count) EFFKERN_LAMBDA {
      const V e = row.exponentials(i, count), d = row.less(largest, i, count);
      sums.e.add(e);
      sums.ed += e * d;
      if constexpr (!kPlain) {
        const V a = a_at(i, count);
        sums.a += a;
        sums.ad += a * d;
      }
    };
    const Sums all = over_row<S>(classes, Sums{}, merge, add);
    CrossEntropySums<S> sums{static_cast<S>(all.e.total()), sum_lanes(all.ed), sum_lanes(all.a),
                             sum_lanes(all.ad)};
    if constexpr (kPlain) {
      const S smoothing = static_cast<S>(task.label_smoothing);
      sums.a = smoothing;
      sums.ad = smoothing * (row.mean() - largest);
    }
    S on_target = 0;
    if (targets) {
      on_target = coefficients.on_target(target);
      sums.a += on_target;
      sums.ad += on_target * (x[target] - largest);
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
      const V dz =
          cross_entropy_grad_logit(row.exponentials(i, count), a_at(i, count) + more, factor);
      return softmax_grad_x(dz, row.centred(i, count), gradient);
    };
    // The target's own, before the row is overwritten.
    const S of_target = targets ? grad_at(target, 1, on_target)[0] : S(0);
    for_each_vector<S>(classes, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
      store_some(grad + i, grad_at(i, count, S(0)), count);
    });
    if (targets) grad[target] = of_target;
    grads.write(1);
  }
}

template <class S>
void rows_in(const NormSoftmaxCrossEntropyTask& task, int64_t begin, int64_t end) {
  const bool is_plain = task.target_kind == TargetKind::kIndices && !task.weight;
  is_plain ? rows<S, true>(task, begin, end) : rows<S, false>(task, begin, end);
}

}  // namespace

void norm_softmax_cross_entropy(const NormSoftmaxCrossEntropyTask& task, int64_t begin,
                                int64_t end) {
  task.dtype == DType::kFloat64 ? rows_in<double>(task, begin, end)
                                : rows_in<float>(task, begin, end);
}

}  // namespace effkern::cpu::EFFKERN_ISA
