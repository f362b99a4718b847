// NormSoftmax, a row at a time: the first pass over a row brings it into the nearest cache and the
// others find it there, so each byte of memory is read once and written once. The exponentials go
// from pass to pass in a buffer. Rows of 16-bit numbers are widened there first, so that there is
// one copy of the passes for all of them.
// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/softmax_row.h"
#include "cpu/kernels/strided.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// The rows of a task. M is NoMask, uint8_t or S.
template <class S, class M>
class SoftmaxRows {
 public:
  explicit SoftmaxRows(const NormSoftmaxTask& task)
      : task_(task),
        x_(task.x, task.dtype, task.x_rows, task.features),
        mask_(task.mask, mask_dtype(task), task.mask_rows, task.features),
        tau_(task.tau ? *static_cast<const S*>(task.tau) : static_cast<S>(task.tau_value)) {}

  S tau() const { return tau_; }
  bool is_gathered() const { return x_.is_gathered() || mask_.is_gathered(); }
  void read(int64_t first, int64_t count) {
    x_.read(first, count);
    mask_.read(first, count);
  }
  SoftmaxRow<S, M> operator[](int64_t r) const {
    RowMask<S, M> mask{nullptr, static_cast<S>(task_.mask_hidden)};
    if constexpr (RowMask<S, M>::kHides) mask.row = mask_[r];
    return {x_[r], mask, task_.features, tau_, static_cast<S>(task_.eps)};
  }

 private:
  using MaskRows = RowsIn<std::conditional_t<std::is_same_v<M, NoMask>, S, M>>;

  static DType mask_dtype(const NormSoftmaxTask& task) {
    return task.mask_kind == MaskKind::kAsInput ? task.dtype : accumulation_of(task.dtype);
  }

  const NormSoftmaxTask& task_;
  RowsIn<S> x_;
  MaskRows mask_;
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

template <class S>
void fill_zeros(S* row, int64_t features) {
  __builtin_memset(row, 0, static_cast<size_t>(features) * sizeof(S));
}

template <class S, class M>
void forward_rows(const NormSoftmaxForward& args, int64_t begin, int64_t end) {
  const int64_t features = args.features;
  SoftmaxRows<S, M> rows(args);
  RowsOut<S> out(args.y, args.dtype, args.y_rows, features);
  const bool streamed = out.is_direct() && is_streamed<S>(args.y, args.rows, features);
  const Buffer<S> buffer(features);
  S* const exponentials = buffer.data();

  const auto work = [&](int64_t r, int64_t) {
    const SoftmaxRow<S, M> row = rows[r];
    S* const y = out[r];
    if (row.visible() == 0) return fill_zeros(y, features);
    const S factor = write_exponentials(row, features, exponentials);
    for_each_vector<S>(features, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
      put(y + i, load_some(exponentials + i, count) * factor, count, streamed);
    });
  };
  over_rows(
      begin, end, rows.is_gathered() || out.is_gathered() ? neighbours(features) : 1,
      [&](int64_t first, int64_t count) {
        rows.read(first, count);
        out.begin(first);
      },
      work, [&](int64_t count) { out.write(count); });
  if (streamed) finish_streams();
}

template <class S, class M>
void backward_rows(const NormSoftmaxBackward& args, int64_t begin, int64_t end) {
  const int64_t features = args.features;
  SoftmaxRows<S, M> rows(args);
  RowsIn<S> grads(args.grad, args.dtype, args.grad_rows, features);
  RowsOut<S> out(args.grad_x, args.dtype, args.grad_x_rows, features);
  S* const grad_tau = static_cast<S*>(args.grad_tau);
  const bool streamed =
      args.grad_x && out.is_direct() && is_streamed<S>(args.grad_x, args.rows, features);
  const Buffer<S> buffer(features);
  S* const exponentials = buffer.data();

  const auto work = [&](int64_t r, int64_t number) {
    const SoftmaxRow<S, M> row = rows[r];
    const S* const grad = grads[r];
    S* const grad_x = out[r];
    if (row.visible() == 0) {
      if (grad_x) fill_zeros(grad_x, features);
      if (grad_tau) grad_tau[number] = 0;
      return;
    }
    const SoftmaxRowGradient<S, M> gradient(row, features, grad, exponentials, grad_tau != nullptr);
    if (grad_tau) grad_tau[number] = gradient.of_tau(rows.tau());
    if (!grad_x) return;
    for_each_vector<S>(features, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
      put(grad_x + i, gradient.at(i, count), count, streamed);
    });
  };
  const bool gathered = rows.is_gathered() || grads.is_gathered() || out.is_gathered();
  over_rows(
      begin, end, gathered ? neighbours(features) : 1,
      [&](int64_t first, int64_t count) {
        rows.read(first, count);
        grads.read(first, count);
        out.begin(first);
      },
      work, [&](int64_t count) { out.write(count); });
  if (streamed) finish_streams();
}

// Calls body with values of the types of x and of the mask, as they are computed with.
template <class Body>
void with_types(const NormSoftmaxTask& task, const Body& body) {
  const auto with_x = [&](auto x) {
    if (task.mask_kind == MaskKind::kNone) return body(x, NoMask{});
    if (task.mask_kind == MaskKind::kBool) return body(x, uint8_t{});
    return body(x, x);
  };
  task.dtype == DType::kFloat64 ? with_x(double{}) : with_x(float{});
}

void forward(const NormSoftmaxForward& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto x, auto mask) {
    forward_rows<decltype(x), decltype(mask)>(args, begin, end);
  });
}

void backward(const NormSoftmaxBackward& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto x, auto mask) {
    backward_rows<decltype(x), decltype(mask)>(args, begin, end);
  });
}

}  // namespace

NormSoftmaxKernels norm_softmax() { return {forward, backward}; }

}  // namespace effkern::cpu::EFFKERN_ISA
