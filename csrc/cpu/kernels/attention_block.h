// What both passes of attention by its scores share: keys and values in the order in which products
// read them, and the masks of rows. cpu/kernels/isa.h must come first.
#pragma once

#include "cpu/kernels/multiply.h"
#include "cpu/kernels/scratch.h"
#include "cpu/kernels/softmax_row.h"
#include "cpu/kernels/strided.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Rows whose scores are held together: fewer of many keys, for they should stay in a cache.
inline int64_t rows_of_a_block(int64_t keys) {
  constexpr int64_t kMost = 8 * kTallRows, kFewest = 4 * kTallRows, kScores = int64_t{1} << 16;
  const int64_t fit = kScores / (keys > 0 ? keys : 1) / kTallRows * kTallRows;
  return fit < kFewest ? kFewest : fit > kMost ? kMost : fit;
}

// From one row of scores to the next: room for whole tiles, and one cache line more, so that rows
// do not all fall into the same few sets of a cache.
template <class S>
int64_t stride_of_scores(int64_t keys) {
  return whole(keys + kTallRows, kTileColumns<S>) + 64 / static_cast<int64_t>(sizeof(S));
}

// Rows of any dtype, brought to type S and filled up with zeros to `stride`.
template <class S>
class RowReader {
 public:
  RowReader(const void* data, DType dtype, const RowLayout& layout, int64_t features,
            int64_t stride)
      : data_(data), dtype_(dtype), layout_(layout), features_(features), stride_(stride) {}

  int64_t stride() const { return stride_; }
  void read(int64_t row, S* to) const {
    with_storage<S>(dtype_, [&](auto storage) {
      using T = decltype(storage);
      load_row(static_cast<const T*>(data_) + row_offset(layout_, row), features_, stride_, to);
    });
  }
  void read(int64_t first, int64_t count, S* to) const {
    for (int64_t i = 0; i < count; ++i) read(first + i, to + i * stride_);
  }

 private:
  const void* data_;
  DType dtype_;
  RowLayout layout_;
  int64_t features_, stride_;
};

template <class S>
void write_row(void* data, DType dtype, int64_t row, int64_t features, const S* from) {
  with_storage<S>(dtype, [&](auto storage) {
    using T = decltype(storage);
    store_row(static_cast<T*>(data) + row * features, from, features);
  });
}

// Where a matrix of `count` rows goes: its rows in panels of columns, its columns in panels of
// rows. Null: not wanted.
template <class S>
struct Packed {
  S *rows = nullptr, *columns = nullptr;

  static int64_t size(int64_t count, int64_t stride) {
    return whole(count, kTileColumns<S>) * stride;
  }
  Panels<S> by_rows(int64_t count) const {
    constexpr int64_t kWidth = kTileColumns<S>;
    return {rows, kWidth, whole(count, kWidth) * kWidth};
  }
  Panels<S> by_columns(int64_t stride) const {
    constexpr int64_t kWidth = kTileColumns<S>;
    return {columns, kWidth, stride * kWidth};
  }
};

// Packs `count` rows less `offset` (null: none). `block` has room for kTileColumns rows.
template <class S>
void pack(const RowReader<S>& reader, int64_t first, int64_t count, const S* offset, S* block,
          Packed<S> to) {
  constexpr int64_t kWidth = kTileColumns<S>;
  const int64_t stride = reader.stride(), height = whole(count, kWidth);
  for (int64_t row = 0; row < count; row += kWidth) {
    const int64_t some = least(kWidth, count - row);
    reader.read(first + row, some, block);
    clear(block + some * stride, (kWidth - some) * stride);
    for (int64_t i = 0; offset && i < some; ++i) {
      S* const key = block + i * stride;
      for (int64_t f = 0; f < stride; f += kLanes<S>)
        store(key + f, load(key + f) - load(offset + f));
    }
    if (to.columns) transpose(block, kWidth, stride, stride, to.columns + row * stride, kWidth);
    if (!to.rows) continue;
    for (int64_t n = 0; n < stride; n += kWidth) {
      S* const panel = to.rows + n * height + row * kWidth;
      for (int64_t i = 0; i < kWidth; ++i) {
        for (int64_t f = 0; f < kWidth; f += kLanes<S>) {
          store(panel + i * kWidth + f, load(block + i * stride + n + f));
        }
      }
    }
  }
}

// The mask of a row of scores. M is NoMask, uint8_t or S.
template <class S, class M>
RowMask<S, M> mask_of(const AttentionByScoresTask& task, int64_t batch, int64_t head, int64_t row) {
  RowMask<S, M> mask{nullptr, static_cast<S>(task.mask_hidden)};
  if constexpr (RowMask<S, M>::kHides) {
    mask.row = static_cast<const M*>(task.mask) + batch * task.mask_batch_stride +
               head * task.mask_head_stride + row * task.mask_row_stride;
  }
  return mask;
}

// The first key from `from` on that some row of a head sees; their number where there is none.
template <class S, class M>
int64_t first_seen(const AttentionByScoresTask& task, int64_t batch, int64_t head, int64_t from) {
  if (!RowMask<S, M>::kHides) return least(from, task.keys);
  int64_t first = task.keys;
  const int64_t rows = task.mask_row_stride == 0 ? least(task.rows, 1) : task.rows;
  for (int64_t row = 0; row < rows; ++row) {
    const RowMask<S, M> mask = mask_of<S, M>(task, batch, head, row);
    for (int64_t key = from; key < first; key += kLanes<S>) {
      const int64_t some = least(kLanes<S>, first - key);
      const Lanes<S> visible = mask.at(key, some).visible;
      int64_t lane = 0;
      if (sum_lanes(visible) == 0) continue;
      while (!visible[lane]) ++lane;
      first = key + lane;
    }
  }
  return first;
}

// What may be taken off all keys of a head: the first that is seen, if it and the others lie far
// from the origin beside their difference; then they share an offset, which would cost scores
// digits and does not change a row's distribution. In causal attention that is asked for each row
// of the keys up to it alone.
template <class S, class M>
class CommonOffset {
 public:
  // `keys` has room for two.
  CommonOffset(const AttentionByScoresTask& task, S* keys) : task_(task), keys_(keys) {}

  // Null: nothing; else for rows before `until()`.
  const S* find(const RowReader<S>& reader, int64_t batch, int64_t key_head) {
    find_places(batch, key_head * (task_.heads / task_.key_heads));
    until_ = 0;
    if (second_ >= task_.keys) return nullptr;
    const int64_t row = (batch * task_.key_heads + key_head) * task_.keys;
    reader.read(row + first_, keys_);
    if (!is_near(reader, row + second_)) return nullptr;
    const int64_t far = first_far(reader, batch, key_head);
    until_ = far == task_.keys ? kAllRows : task_.causal ? far : 0;
    return until_ > 0 ? keys_ : nullptr;
  }
  int64_t until() const { return until_; }

  static constexpr int64_t kAllRows = int64_t{1} << 62;

 private:
  // Whether a key lies near the first.
  bool is_near(const RowReader<S>& reader, int64_t row) {
    const int64_t stride = reader.stride();
    reader.read(row, keys_ + stride);
    S of_first = 0, of_other = 0, between = 0;
    for (int64_t i = 0; i < stride; ++i) {
      const S a = keys_[i], b = keys_[stride + i];
      of_first += a * a;
      of_other += b * b;
      between += (a - b) * (a - b);
    }
    return (of_first < of_other ? of_first : of_other) > 16 * between;
  }

  // The first key that does not lie near the first of all, among those that some row sees of the
  // heads that go with them; their number where there is none.
  int64_t first_far(const RowReader<S>& reader, int64_t batch, int64_t key_head) {
    const int64_t row = (batch * task_.key_heads + key_head) * task_.keys;
    for (int64_t key = 0; key < task_.keys; key += kLanes<S>) {
      const int64_t some = least(kLanes<S>, task_.keys - key);
      const Lanes<S> seen = seen_of(batch, key_head, key, some);
      for (int64_t lane = 0; lane < some; ++lane) {
        if (seen[lane] && !is_near(reader, row + key + lane)) return key + lane;
      }
    }
    return task_.keys;
  }

  // Which of `some` keys from `key` on a row sees of the heads that go with them.
  Lanes<S> seen_of(int64_t batch, int64_t key_head, int64_t key, int64_t some) const {
    if (!RowMask<S, M>::kHides) return lanes_below<S>(some);
    const int64_t group = task_.heads / task_.key_heads;
    const int64_t heads = task_.mask_head_stride == 0 ? 1 : group;
    const int64_t rows = task_.mask_row_stride == 0 ? least(task_.rows, 1) : task_.rows;
    Lanes<S> seen = {};
    for (int64_t head = key_head * group; head < key_head * group + heads; ++head) {
      for (int64_t row = 0; row < rows; ++row) {
        seen |= mask_of<S, M>(task_, batch, head, row).at(key, some).visible;
      }
    }
    return seen;
  }

  void find_places(int64_t batch, int64_t head) {
    if (batch == batch_ && (head == head_ || task_.mask_head_stride == 0)) return;
    batch_ = batch, head_ = head;
    first_ = first_seen<S, M>(task_, batch, head, 0);
    second_ = first_seen<S, M>(task_, batch, head, first_ + 1);
  }

  const AttentionByScoresTask& task_;
  S* keys_;
  int64_t batch_ = -1, head_ = -1, first_ = 0, second_ = 0, until_ = 0;
};

enum class PassOf { kForward, kBackward };

// The keys and values of one head, packed as the products of a pass read them.
template <class S, class M>
class HeadOfKeys {
 public:
  HeadOfKeys(const AttentionByScoresTask& task, PassOf pass, int64_t stride, int64_t value_stride,
             Memory& memory)
      : task_(task),
        keys_(task.k, task.dtype, task.k_rows, task.features, stride),
        values_(task.v, task.dtype, task.v_rows, task.value_features, value_stride),
        block_(memory.take<S>(kTileColumns<S> * (stride + value_stride))),
        offset_(task, memory.take<S>(2 * stride)),
        keys{pass == PassOf::kBackward ? memory.take<S>(Packed<S>::size(task.keys, stride))
                                       : nullptr,
             memory.take<S>(Packed<S>::size(task.keys, stride))},
        values{} {
    S* const packed = memory.take<S>(Packed<S>::size(task.keys, value_stride));
    (pass == PassOf::kForward ? values.rows : values.columns) = packed;
  }

  // Of what it takes of the memory.
  static int64_t doubles(const AttentionByScoresTask& task, int64_t stride, int64_t value_stride) {
    constexpr int64_t kArrays = 5, kCacheLine = 8;
    return whole(task.keys + 1, kTileColumns<S>) * (2 * stride + value_stride) +
           kTileColumns<S> * (stride + value_stride) + 2 * stride + kArrays * kCacheLine;
  }

  // One of them as it is; rows are counted through heads and batch.
  void read_key(int64_t row, S* to) const { keys_.read(row, to); }
  void read_value(int64_t row, S* to) const { values_.read(row, to); }

  // Brings a head's keys and values for rows from `row` on: up to what is returned. Heads of keys
  // are counted through the batch.
  int64_t read(int64_t head, int64_t row) {
    const bool is_new = head != head_;
    head_ = head;
    if (is_new) found_ = offset_.find(keys_, head / task_.key_heads, head % task_.key_heads);
    const S* const offset = row < offset_.until() ? found_ : nullptr;
    const int64_t first = head * task_.keys;
    if (is_new || offset != taken_) pack(keys_, first, task_.keys, offset, block_, keys);
    if (is_new) {
      pack(values_, first, task_.keys, static_cast<const S*>(nullptr), block_, values);
    }
    taken_ = offset;
    return offset ? offset_.until() : CommonOffset<S, M>::kAllRows;
  }

 private:
  const AttentionByScoresTask& task_;
  RowReader<S> keys_, values_;
  S* block_;
  CommonOffset<S, M> offset_;
  const S *found_ = nullptr, *taken_ = nullptr;
  int64_t head_ = -1;

 public:
  // Keys less their common offset by columns, and in the backward pass by rows; values by rows, and
  // in the backward pass by columns.
  Packed<S> keys, values;
};

// Calls body with values of the types of scores and of the mask.
template <class Body>
void with_types(const AttentionByScoresTask& task, const Body& body) {
  const auto with_scores = [&](auto score) {
    if (task.mask_kind == MaskKind::kNone) return body(score, NoMask{});
    if (task.mask_kind == MaskKind::kBool) return body(score, uint8_t{});
    return body(score, score);
  };
  task.dtype == DType::kFloat64 ? with_scores(double{}) : with_scores(float{});
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
