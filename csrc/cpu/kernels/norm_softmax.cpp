// NormSoftmax, a row at a time: the first pass over a row brings it into the nearest cache and the
// others find it there, so each byte of memory is read once and written once. The exponentials of a
// long row are computed in each pass that needs them.
// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/strided.h"
#include "cpu/kernels/softmax_row.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// The exponentials of a row, kept from the first pass over them to the others; those of a long row
// are computed anew.
template <class S>
class Exponentials {
 public:
  explicit Exponentials(int64_t features) : held_(features <= kHeld) {}

  template <class Row>
  EFFKERN_MEMBER auto keep(const Row& row, int64_t i, int64_t count) {
    const auto e = row.exponentials(i, count);
    if (held_) store_some(values_ + i, e, count);
    return e;
  }
  template <class Row>
  EFFKERN_MEMBER auto at(const Row& row, int64_t i, int64_t count) const {
    return held_ ? load_some(values_ + i, count) : row.exponentials(i, count);
  }

 private:
  static constexpr int64_t kHeld = 8192;
  bool held_;
  S values_[kHeld];
};

// The rows of a task, some at a time where they are strided.
template <class T, class M>
class SoftmaxRows {
 public:
  using S = Acc<T>;

  explicit SoftmaxRows(const NormSoftmaxTask& task)
      : task_(task),
        x_(task.x, task.x_rows, task.features),
        mask_(task.mask, task.mask_rows, task.features),
        tau_(task.tau ? *static_cast<const S*>(task.tau) : static_cast<S>(task.tau_value)) {}

  S tau() const { return tau_; }
  bool is_dense() const { return x_.is_dense() && mask_.is_dense(); }
  void read(int64_t first, int64_t count) {
    x_.read(first, count);
    mask_.read(first, count);
  }
  SoftmaxRow<T, M> operator[](int64_t r) const {
    const RowMask<T, M> mask{mask_[r], static_cast<S>(task_.mask_hidden)};
    return {x_[r], mask, task_.features, tau_, static_cast<S>(task_.eps)};
  }

 private:
  const NormSoftmaxTask& task_;
  RowsIn<T> x_;
  RowsIn<M> mask_;
  S tau_;
};

// Calls read(first, count), work(r, row) for each of those rows, and write(count).
template <class Read, class Work, class Write>
void over_rows(int64_t begin, int64_t end, int64_t at_a_time, const Read& read, const Work& work,
               const Write& write) {
  for (int64_t first = begin; first < end; first += at_a_time) {
    const int64_t count = end - first < at_a_time ? end - first : at_a_time;
    read(first, count);
    for (int64_t r = 0; r < count; ++r) work(r, first + r);
    write(count);
  }
}

template <class T>
void fill_zeros(T* row, int64_t features) {
  __builtin_memset(row, 0, static_cast<size_t>(features) * sizeof(T));
}

template <class T, class M>
void forward_rows(const NormSoftmaxForward& args, int64_t begin, int64_t end) {
  using S = Acc<T>;
  using V = Vec<T>;
  const int64_t features = args.features;
  SoftmaxRows<T, M> rows(args);
  RowsOut<T> out(args.y, args.y_rows, features);
  const bool streamed = out.is_dense() && is_streamed<T>(args.y, args.rows, features);
  Exponentials<S> held(features);

  const auto work = [&](int64_t r, int64_t) {
    const SoftmaxRow<T, M> row = rows[r];
    T* const y = out[r];
    if (row.visible() == 0) return fill_zeros(y, features);
    const auto merge = [](V a, V b) EFFKERN_LAMBDA { return a + b; };
    const auto add = [&](V& sum, int64_t i, int64_t count)
                         EFFKERN_LAMBDA { sum += held.keep(row, i, count); };
    const S factor = S(1) / sum_lanes(over_row<T>(features, V{}, merge, add));
    for_each_vector<T>(features, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
      put(y + i, held.at(row, i, count) * factor, count, streamed);
    });
  };
  over_rows(
      begin, end, rows.is_dense() && out.is_dense() ? 1 : neighbours(features),
      [&](int64_t first, int64_t count) {
        rows.read(first, count);
        out.begin(first);
      },
      work, [&](int64_t count) { out.write(count); });
  if (streamed) finish_streams();
}

template <class T, class M>
void backward_rows(const NormSoftmaxBackward& args, int64_t begin, int64_t end) {
  using S = Acc<T>;
  using V = Vec<T>;
  struct Sums {
    V e, eg;
  };
  const int64_t features = args.features;
  SoftmaxRows<T, M> rows(args);
  RowsIn<T> grads(args.grad, args.grad_rows, features);
  RowsOut<T> out(args.grad_x, args.grad_x_rows, features);
  S* const grad_tau = static_cast<S*>(args.grad_tau);
  const bool streamed =
      args.grad_x && out.is_dense() && is_streamed<T>(args.grad_x, args.rows, features);
  Exponentials<S> held(features);

  const auto work = [&](int64_t r, int64_t number) {
    const SoftmaxRow<T, M> row = rows[r];
    const T* const grad = grads[r];
    T* const grad_x = out[r];
    if (row.visible() == 0) {
      if (grad_x) fill_zeros(grad_x, features);
      if (grad_tau) grad_tau[number] = 0;
      return;
    }
    const auto merge_sums = [](const Sums& a, const Sums& b)
                                EFFKERN_LAMBDA { return Sums{a.e + b.e, a.eg + b.eg}; };
    const auto add_sums = [&](Sums& sums, int64_t i, int64_t count) EFFKERN_LAMBDA {
      const V e = held.keep(row, i, count);
      sums.e += e;
      sums.eg += e * row.visible_of(grad, i, count);
    };
    const Sums sums = over_row<T>(features, Sums{}, merge_sums, add_sums);
    SoftmaxGradient<S> gradient{};
    gradient.factor = S(1) / sum_lanes(sums.e);
    gradient.mean_g = sum_lanes(sums.eg) * gradient.factor;
    gradient.inverse = S(1) / row.divisor().value;

    const auto dz_at = [&](int64_t i, int64_t count) EFFKERN_LAMBDA {
      return softmax_grad_logit(held.at(row, i, count), row.visible_of(grad, i, count), gradient);
    };
    if (row.divisor().is_sigma || grad_tau) {
      const auto merge = [](V a, V b) EFFKERN_LAMBDA { return a + b; };
      const auto add = [&](V& sum, int64_t i, int64_t count)
                           EFFKERN_LAMBDA { sum += dz_at(i, count) * row.centred(i, count); };
      const S along = sum_lanes(over_row<T>(features, V{}, merge, add));
      gradient.on_c = softmax_on_c(along, row.squares(), row.divisor());
      if (grad_tau) grad_tau[number] = softmax_grad_tau(along, rows.tau(), row.divisor());
    }
    if (!grad_x) return;
    for_each_vector<T>(features, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
      const V dx = softmax_grad_x(dz_at(i, count), row.centred(i, count), gradient);
      put(grad_x + i, dx, count, streamed);
    });
  };
  const bool dense = rows.is_dense() && grads.is_dense() && out.is_dense();
  over_rows(
      begin, end, dense ? 1 : neighbours(features),
      [&](int64_t first, int64_t count) {
        rows.read(first, count);
        grads.read(first, count);
        out.begin(first);
      },
      work, [&](int64_t count) { out.write(count); });
  if (streamed) finish_streams();
}

// Calls body with values of the storage types of x and of the mask.
template <class Body>
void with_mask_types(const NormSoftmaxTask& task, const Body& body) {
  const auto with_x = [&](auto x) {
    using T = decltype(x);
    switch (task.mask_kind) {
      case MaskKind::kNone:
        return body(x, NoMask{});
      case MaskKind::kBool:
        return body(x, uint8_t{});
      case MaskKind::kAsInput:
        return body(x, T{});
      case MaskKind::kAccumulated:
        return body(x, Acc<T>{});
    }
  };
  switch (task.dtype) {
    case DType::kFloat32:
      return with_x(float{});
    case DType::kFloat64:
      return with_x(double{});
    case DType::kBFloat16:
      return with_x(BFloat16{});
    case DType::kFloat16:
      return with_x(Float16{});
  }
}

void forward(const NormSoftmaxForward& args, int64_t begin, int64_t end) {
  with_mask_types(args, [&](auto x, auto mask) {
    forward_rows<decltype(x), decltype(mask)>(args, begin, end);
  });
}

void backward(const NormSoftmaxBackward& args, int64_t begin, int64_t end) {
  with_mask_types(args, [&](auto x, auto mask) {
    backward_rows<decltype(x), decltype(mask)>(args, begin, end);
  });
}

}  // namespace

NormSoftmaxKernels norm_softmax() { return {forward, backward}; }

}  // namespace effkern::cpu::EFFKERN_ISA
