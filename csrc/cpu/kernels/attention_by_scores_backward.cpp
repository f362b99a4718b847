// The gradients of attention with NormSoftmax, the scores of some rows at a time.
// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/attention_block.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {
namespace {

template <class S, class M>
class Backward {
 public:
  explicit Backward(const AttentionByScoresBackward& args)
      : args_(args),
        stride_(whole(args.features, kTileColumns<S>)),
        value_stride_(whole(args.value_features, kTileColumns<S>)),
        score_stride_(stride_of_scores<S>(args.keys)),
        tall_keys_(whole(args.keys, kTallRows)),
        most_(rows_of_a_block(args.keys)),
        memory_(HeadOfKeys<S, M>::doubles(args, stride_, value_stride_) +
                tall_keys_ * (stride_ + value_stride_) +
                most_ * (2 * stride_ + value_stride_ + 3 * score_stride_) + 8 * 8),
        keys_(args, PassOf::kBackward, stride_, value_stride_, memory_),
        of_keys_(memory_.take<S>(tall_keys_ * stride_)),
        of_values_(memory_.take<S>(tall_keys_ * value_stride_)),
        q_(memory_.take<S>(most_ * stride_)),
        of_q_(memory_.take<S>(most_ * stride_)),
        grad_(memory_.take<S>(most_ * value_stride_)),
        scores_(memory_.take<S>(most_ * score_stride_)),
        exponentials_(memory_.take<S>(most_ * score_stride_)),
        of_scores_(memory_.take<S>(most_ * score_stride_)) {}

  // A head of keys with its heads of queries.
  void run(int64_t of_keys) {
    clear(of_keys_, tall_keys_ * stride_);
    clear(of_values_, tall_keys_ * value_stride_);
    const int64_t group = args_.heads / args_.key_heads;
    for (int64_t head = of_keys * group; head < (of_keys + 1) * group; ++head) {
      for (int64_t row = 0, next; row < args_.rows; row = next) {
        next = least(keys_.read(of_keys, row), least(row + most_, args_.rows));
        block(head, row, next - row);
      }
    }
    for (int64_t key = 0; key < args_.keys; ++key) {
      const int64_t row = of_keys * args_.keys + key;
      write_row(args_.of_k, args_.dtype, row, args_.features, of_keys_ + key * stride_);
      write_row(args_.of_v, args_.dtype, row, args_.value_features,
                of_values_ + key * value_stride_);
    }
  }

 private:
  // `count` rows of a head.
  void block(int64_t head, int64_t first, int64_t count) {
    const int64_t tall = whole(count, kTallRows), row = head * args_.rows + first;
    const int64_t seen = args_.causal ? least(args_.keys, first + count) : args_.keys;
    const int64_t columns = whole(seen, kTileColumns<S>), tall_seen = whole(seen, kTallRows);
    const S scale = static_cast<S>(args_.scale);
    RowReader<S>(args_.q, args_.dtype, args_.q_rows, args_.features, stride_).read(row, count, q_);
    RowReader<S>(args_.grad, args_.dtype, args_.grad_rows, args_.value_features, value_stride_)
        .read(row, count, grad_);
    clear(q_ + count * stride_, (tall - count) * stride_);
    clear(grad_ + count * value_stride_, (tall - count) * value_stride_);
    multiply_panels<Stays::kPanel, Onto::kNothing, S>(
        tall, columns, args_.features, {q_, stride_, 1}, keys_.keys.by_columns(stride_), scores_,
        score_stride_, scale);
    multiply_panels<Stays::kPanel, Onto::kNothing, S>(
        tall, columns, args_.value_features, {grad_, value_stride_, 1},
        keys_.values.by_columns(value_stride_), of_scores_, score_stride_, S(1));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t sees = args_.causal ? least(args_.keys, first + i + 1) : args_.keys;
      softmax(head, first + i, sees, i);
      // Columns that products read with the others.
      for (S* const p : {exponentials_ + i * score_stride_, of_scores_ + i * score_stride_}) {
        clear(p + sees, (columns > tall_seen ? columns : tall_seen) - sees);
      }
    }
    multiply_panels<Stays::kPanel, Onto::kNothing, S>(
        tall, stride_, seen, {of_scores_, score_stride_, 1}, keys_.keys.by_rows(args_.keys), of_q_,
        stride_, scale);
    for (int64_t i = 0; i < count; ++i) {
      write_row(args_.of_q, args_.dtype, row + i, args_.features, of_q_ + i * stride_);
    }
    constexpr int64_t kWidth = kTileColumns<S>;
    multiply_panels<Stays::kRows, Onto::kSum, S>(tall_seen, stride_, count,
                                                 {of_scores_, 1, score_stride_},
                                                 {q_, stride_, kWidth}, of_keys_, stride_, scale);
    multiply_panels<Stays::kRows, Onto::kSum, S>(
        tall_seen, value_stride_, count, {exponentials_, 1, score_stride_},
        {grad_, value_stride_, kWidth}, of_values_, value_stride_, S(1));
  }

  // Of row `i` of the block: its exponentials, the gradients of its scores in place of those of its
  // distribution, and the row of grad_ times what exponentials are to be multiplied by.
  void softmax(int64_t head, int64_t number, int64_t sees, int64_t i) const {
    const S tau = *static_cast<const S*>(args_.tau);
    S *const exponentials = exponentials_ + i * score_stride_, *const of_scores =
                                                                   of_scores_ + i * score_stride_;
    S* const of_tau =
        args_.of_tau ? static_cast<S*>(args_.of_tau) + head * args_.rows + number : nullptr;
    const SoftmaxRow<S, M> row(scores_ + i * score_stride_,
                               mask_of<S, M>(args_, head / args_.heads, head % args_.heads, number),
                               sees, tau, static_cast<S>(args_.eps));
    S factor = 0;
    if (row.visible() > 0) {
      const SoftmaxRowGradient<S, M> gradient(row, sees, of_scores, exponentials,
                                              of_tau != nullptr);
      if (of_tau) *of_tau = gradient.of_tau(tau);
      for_each_vector<S>(sees, [&](int64_t j, int64_t some, int) EFFKERN_LAMBDA {
        store_some(of_scores + j, gradient.at(j, some), some);
      });
      factor = gradient.factor();
    } else {
      if (of_tau) *of_tau = 0;
      clear(exponentials, sees);
      clear(of_scores, sees);
    }
    S* const grad = grad_ + i * value_stride_;
    for (int64_t f = 0; f < value_stride_; f += kLanes<S>) store(grad + f, load(grad + f) * factor);
  }

  const AttentionByScoresBackward& args_;
  int64_t stride_, value_stride_, score_stride_, tall_keys_, most_;
  Memory memory_;
  HeadOfKeys<S, M> keys_;
  S *of_keys_, *of_values_, *q_, *of_q_, *grad_, *scores_, *exponentials_, *of_scores_;
};

}  // namespace

void attention_by_scores_backward(const AttentionByScoresBackward& args, int64_t begin,
                                  int64_t end) {
  with_types(args, [&](auto score, auto mask) {
    Backward<decltype(score), decltype(mask)> pass(args);
    for (int64_t unit = begin; unit < end; ++unit) pass.run(unit);
  });
}

}  // namespace effkern::cpu::EFFKERN_ISA
