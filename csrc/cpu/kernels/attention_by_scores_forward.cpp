// Attention with NormSoftmax by its definition, the scores of some rows at a time: they stay in the
// caches, and no more of them is held.
// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/attention_block.h"
// clang-format on

namespace effkern::cpu::EFFKERN_ISA {
namespace {

template <class S, class M>
class Forward {
 public:
  explicit Forward(const AttentionByScoresForward& args)
      : args_(args),
        stride_(whole(args.features, kTileColumns<S>)),
        value_stride_(whole(args.value_features, kTileColumns<S>)),
        score_stride_(stride_of_scores<S>(args.keys)),
        most_(rows_of_a_block(args.keys)),
        memory_(HeadOfKeys<S, M>::doubles(args, stride_, value_stride_) +
                most_ * (stride_ + score_stride_ + value_stride_ + 1) + stride_ + value_stride_ +
                5 * 8),
        keys_(args, PassOf::kForward, stride_, value_stride_, memory_),
        q_(memory_.take<S>(most_ * stride_)),
        scores_(memory_.take<S>(most_ * score_stride_)),
        y_(memory_.take<S>(most_ * value_stride_)),
        factors_(memory_.take<S>(most_)),
        row_(memory_.take<S>(stride_ + value_stride_)) {}

  void run(int64_t begin, int64_t end) {
    const int64_t stretches = (args_.rows + kAttentionRows - 1) / kAttentionRows;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / stretches, first = unit % stretches * kAttentionRows;
      if (args_.rows <= kFewRows) {
        few_rows(head);
        continue;
      }
      const int64_t last = least(first + kAttentionRows, args_.rows), of_keys = key_head(head);
      for (int64_t row = first, next; row < last; row = next) {
        next = least(keys_.read(of_keys, row), least(row + most_, last));
        block(head, row, next - row);
      }
    }
  }

 private:
  // So few rows do not pay for packed keys.
  static constexpr int64_t kFewRows = 3;

  // Heads are counted through the batch.
  int64_t key_head(int64_t head) const { return head / (args_.heads / args_.key_heads); }

  // `count` rows of a head.
  void block(int64_t head, int64_t first, int64_t count) {
    const int64_t tall = whole(count, kTallRows);
    const int64_t seen = args_.causal ? least(args_.keys, first + count) : args_.keys;
    const int64_t columns = whole(seen, kTileColumns<S>);
    RowReader<S>(args_.q, args_.dtype, args_.q_rows, args_.features, stride_)
        .read(head * args_.rows + first, count, q_);
    clear(q_ + count * stride_, (tall - count) * stride_);
    multiply_panels<Stays::kPanel, Onto::kNothing, S>(
        tall, columns, args_.features, {q_, stride_, 1}, keys_.keys.by_columns(stride_), scores_,
        score_stride_, static_cast<S>(args_.scale));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t sees = args_.causal ? least(args_.keys, first + i + 1) : args_.keys;
      factors_[i] = softmax(head, first + i, sees, scores_ + i * score_stride_);
      clear(scores_ + i * score_stride_ + sees, seen - sees);
    }
    multiply_panels<Stays::kPanel, Onto::kNothing, S>(
        tall, value_stride_, seen, {scores_, score_stride_, 1}, keys_.values.by_rows(args_.keys),
        y_, value_stride_, S(1));
    store_rows(head * args_.rows + first, count);
  }

  // All rows of a head, which are few: each key and value is read once, where it lies.
  void few_rows(int64_t head) {
    const int64_t count = args_.rows, seen = args_.causal ? least(args_.keys, count) : args_.keys;
    const int64_t of_keys = key_head(head) * args_.keys;
    RowReader<S>(args_.q, args_.dtype, args_.q_rows, args_.features, stride_)
        .read(head * count, count, q_);
    for (int64_t key = 0; key < seen; ++key) {
      keys_.read_key(of_keys + key, row_);
      for (int64_t i = 0; i < count; ++i) {
        scores_[i * score_stride_ + key] =
            dot(q_ + i * stride_, row_, stride_) * static_cast<S>(args_.scale);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t sees = args_.causal ? least(args_.keys, i + 1) : args_.keys;
      S* const scores = scores_ + i * score_stride_;
      factors_[i] = softmax(head, i, sees, scores);
      clear(scores + sees, seen - sees);
    }
    S* const y = y_;
    S* const some = y_ + kFewRows * value_stride_;  // of some keys: a long sum loses digits
    constexpr int64_t kSome = 256;
    clear(y, count * value_stride_);
    for (int64_t first = 0; first < seen; first += kSome) {
      clear(some, count * value_stride_);
      for (int64_t key = first; key < least(first + kSome, seen); ++key) {
        keys_.read_value(of_keys + key, row_);
        for (int64_t i = 0; i < count; ++i) {
          add_row(scores_[i * score_stride_ + key], row_, some + i * value_stride_);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        add_row(S(1), some + i * value_stride_, y + i * value_stride_);
      }
    }
    store_rows(head * count, count);
  }

  void add_row(S factor, const S* from, S* to) const {
    for (int64_t f = 0; f < value_stride_; f += kLanes<S>) {
      store(to + f, load(to + f) + factor * load(from + f));
    }
  }

  // The rows of y_ times their factors.
  void store_rows(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      S* const y = y_ + i * value_stride_;
      for (int64_t f = 0; f < value_stride_; f += kLanes<S>)
        store(y + f, load(y + f) * factors_[i]);
      write_row(args_.y, args_.dtype, first + i, args_.value_features, y);
    }
  }

  // Puts the exponentials of a row in its place, and returns what they are to be multiplied by.
  S softmax(int64_t head, int64_t number, int64_t sees, S* scores) const {
    const SoftmaxRow<S, M> row(scores,
                               mask_of<S, M>(args_, head / args_.heads, head % args_.heads, number),
                               sees, *static_cast<const S*>(args_.tau), static_cast<S>(args_.eps));
    if (row.visible() > 0) return write_exponentials(row, sees, scores);
    clear(scores, sees);
    return 0;
  }

  const AttentionByScoresForward& args_;
  int64_t stride_, value_stride_, score_stride_, most_;
  Memory memory_;
  HeadOfKeys<S, M> keys_;
  S *q_, *scores_, *y_, *factors_, *row_;
};

}  // namespace

void attention_by_scores_forward(const AttentionByScoresForward& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto score, auto mask) {
    Forward<decltype(score), decltype(mask)>(args).run(begin, end);
  });
}

}  // namespace effkern::cpu::EFFKERN_ISA
