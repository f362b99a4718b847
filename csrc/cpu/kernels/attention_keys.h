// The keys of a head, their moments, and how a chunk of rows sees them: what both passes of
// NormSoftmax attention share. cpu/kernels/isa.h must come first.
#pragma once

#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/kernels/multiply.h"
#include "math/norm_attention.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Keys (and rows) that are taken together.
constexpr int64_t kChunkKeys = 64;

constexpr int64_t whole(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Numbers for one thread's use, handed out from one allocation.
class Memory {
 public:
  explicit Memory(int64_t doubles)
      : block_(static_cast<double*>(
            ::aligned_alloc(64, static_cast<size_t>(whole(doubles, 8)) * sizeof(double)))),
        next_(block_) {
    if (!block_) ::abort();
  }
  ~Memory() { ::free(block_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <class S>
  S* take(int64_t count) {
    S* const mine = reinterpret_cast<S*>(next_);
    next_ += whole(count, 8);
    return mine;
  }

 private:
  double *block_, *next_;
};

template <class S>
void clear(S* p, int64_t count) {
  __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(S));
}

// Row by row, filled up with zeros to `stride`.
template <class T>
EFFKERN_INLINE void load_row(const T* from, int64_t features, int64_t stride, Acc<T>* to) {
  int64_t i = 0;
  for (; i < features; i += kLanes<T>) {
    store(to + i, load_some(from + i, least(features - i, kLanes<T>)));
  }
  for (; i < stride; i += kLanes<T>) store(to + i, Vec<T>{});
}

template <class T>
EFFKERN_INLINE void store_row(T* to, const Acc<T>* from, int64_t features) {
  for (int64_t i = 0; i < features; i += kLanes<T>) {
    store_some(to + i, load(from + i), least(features - i, kLanes<T>));
  }
}

// The sum of products, in an order that depends on the length alone.
template <class S>
EFFKERN_INLINE S dot(const S* a, const S* b, int64_t stride) {
  Vec<S> sums[2] = {};
  for (int64_t i = 0; i < stride; i += 2 * kLanes<S>) {
    sums[0] += load(a + i) * load(b + i);
    sums[1] += load(a + i + kLanes<S>) * load(b + i + kLanes<S>);
  }
  return sum_lanes(sums[0] + sums[1]);
}

// The keys of one head, and what is known of those that have been added.
template <class T>
class Keys {
 public:
  using S = Acc<T>;

  Keys(const NormAttentionTask& task, Memory& memory)
      : task_(task),
        stride_(whole(task.features, kTileColumns<float>)),
        mean(memory.take<double>(stride_)),
        moments(memory.take<double>(stride_ * stride_)),
        chunk(memory.take<double>(kChunkKeys * stride_)),
        row_(memory.take<S>(stride_)),
        chunk_mean_(memory.take<double>(stride_)) {}

  static int64_t doubles(int64_t stride) {
    return (3 * 8 + 3 * stride) + stride * stride + kChunkKeys * stride;
  }

  int64_t stride() const { return stride_; }

  void start(int64_t batch, int64_t head) {
    first_row_ = (batch * task_.key_heads + head) * task_.keys;
    seen_ = task_.seen
                ? task_.seen + batch * task_.seen_batch_stride + head * task_.seen_head_stride
                : nullptr;
    count = 0;
    clear(mean, stride_);
    clear(moments, stride_ * stride_);
    // As long as there are no keys, the first of them stands for their mean.
    for (int64_t key = 0; key < task_.keys; ++key) {
      if (!is_seen(key)) continue;
      const S* const from = row(key);
      for (int64_t i = 0; i < stride_; ++i) mean[i] = from[i];
      return;
    }
  }

  bool is_seen(int64_t key) const { return key < task_.keys && (!seen_ || seen_[key]); }

  const S* row(int64_t key) const {
    load_row(static_cast<const T*>(task_.k) + row_offset(task_.k_rows, first_row_ + key),
             task_.features, stride_, row_);
    return row_;
  }

  int64_t first_row() const { return first_row_; }

  // Brings a chunk near: `chunk` holds it, zeros for what is hidden. Its number of seen keys.
  int64_t load_chunk(int64_t first) {
    int64_t seen = 0;
    for (int64_t j = 0; j < kChunkKeys; ++j) {
      double* const to = chunk + j * stride_;
      if (is_seen(first + j)) {
        const S* const from = row(first + j);
        for (int64_t i = 0; i < stride_; ++i) to[i] = from[i];
        ++seen;
      } else {
        clear(to, stride_);
      }
    }
    return seen;
  }

  // The mean of a loaded chunk's keys.
  const double* mean_of_chunk(int64_t seen) {
    clear(chunk_mean_, stride_);
    for (int64_t j = 0; j < kChunkKeys; ++j) {
      const double* const key = chunk + j * stride_;
      for (int64_t i = 0; i < stride_; ++i) chunk_mean_[i] += key[i];
    }
    for (int64_t i = 0; i < stride_; ++i) chunk_mean_[i] /= static_cast<double>(seen);
    return chunk_mean_;
  }

  // Joins a loaded chunk to the others, and leaves it without its mean. Of the moments what stands
  // on and above the diagonal is kept.
  void join_chunk(int64_t first, int64_t seen) {
    if (seen == 0) return;
    mean_of_chunk(seen);
    for (int64_t j = 0; j < kChunkKeys; ++j) {
      if (!is_seen(first + j)) continue;
      double* const key = chunk + j * stride_;
      for (int64_t i = 0; i < stride_; ++i) key[i] -= chunk_mean_[i];
    }
    const int64_t rows = whole(task_.features, kTileRows);
    multiply_add<Part::kUpperResult, double>(rows, stride_, kChunkKeys, {chunk, 1, stride_}, chunk,
                                             stride_, moments, stride_);
    const double n_b = static_cast<double>(seen), weight = joining_weight(count, n_b);
    for (int64_t i = 0; i < stride_; ++i) chunk_mean_[i] -= mean[i];
    for (int64_t a = 0; count > 0 && a < task_.features; ++a) {
      const double factor = weight * chunk_mean_[a];
      double* const to = moments + a * stride_;
      for (int64_t b = a; b < stride_; ++b) to[b] += factor * chunk_mean_[b];
    }
    for (int64_t i = 0; i < stride_; ++i) mean[i] += n_b / (count + n_b) * chunk_mean_[i];
    count += n_b;
  }

  void join_all() {
    for (int64_t first = 0; first < task_.keys; first += kChunkKeys) {
      join_chunk(first, load_chunk(first));
    }
  }

  // U with q^T U q = q^T moments q, and zeros below the diagonal.
  void to_upper(double* upper) const {
    clear(upper, stride_ * stride_);
    for (int64_t a = 0; a < task_.features; ++a) {
      upper[a * stride_ + a] = moments[a * stride_ + a];
      for (int64_t b = a + 1; b < task_.features; ++b) {
        upper[a * stride_ + b] = 2 * moments[a * stride_ + b];
      }
    }
  }

  const NormAttentionTask& task_;

 private:
  int64_t stride_;

 public:
  double* mean;
  double* moments;
  double* chunk;
  double count = 0;

 private:
  S* row_;
  double* chunk_mean_;
  int64_t first_row_ = 0;
  const uint8_t* seen_ = nullptr;
};

// Makes a matrix whose upper part is given symmetric.
template <class From, class S>
void to_symmetric(const From* upper, int64_t features, int64_t stride, S* whole_matrix) {
  for (int64_t a = 0; a < features; ++a) {
    for (int64_t b = a; b < features; ++b) {
      const S value = static_cast<S>(upper[a * stride + b]);
      whole_matrix[a * stride + b] = whole_matrix[b * stride + a] = value;
    }
  }
}

// ---- a chunk's own keys, as its rows see them ----

template <class S>
struct OwnKeys {
  S* keys;        // (kChunkKeys, stride): less the mean of those before; zeros for what is hidden
  S* transposed;  // (stride, kChunkKeys)
  S* scores;      // (kChunkKeys rows, kChunkKeys)
  S* seen;        // (kChunkKeys): one or zero
  double* count;  // (kChunkKeys): of the keys up to each, those before included
};

// From a loaded chunk of keys.
template <class T>
void set_own_keys(const Keys<T>& keys, int64_t first, OwnKeys<Acc<T>> own) {
  using S = Acc<T>;
  const int64_t stride = keys.stride();
  double count = keys.count;
  for (int64_t j = 0; j < kChunkKeys; ++j) {
    const bool seen = keys.is_seen(first + j);
    own.seen[j] = seen ? S(1) : S(0);
    own.count[j] = count += seen ? 1 : 0;
    S* const to = own.keys + j * stride;
    const double* const from = keys.chunk + j * stride;
    if (seen) {
      for (int64_t i = 0; i < stride; ++i) to[i] = static_cast<S>(from[i] - keys.mean[i]);
    } else {
      clear(to, stride);
    }
  }
  for (int64_t i = 0; i < stride; ++i) {
    S* const to = own.transposed + i * kChunkKeys;
    for (int64_t j = 0; j < kChunkKeys; ++j) to[j] = own.keys[j * stride + i];
  }
}

template <class S>
struct OwnRow {
  double count;  // of keys that the row sees
  S mean;        // of its scores, those before included
  double squares;
};

// Row `i` of the scores: what it does not see becomes zero, the rest loses its mean. Scores of
// hidden keys are zero.
template <class T>
OwnRow<Acc<T>> centre_scores(double count_before, const OwnKeys<Acc<T>>& own, int64_t i) {
  using S = Acc<T>;
  S* const scores = own.scores + i * kChunkKeys;
  for (int64_t j = i + 1; j < whole(i + 1, kLanes<S>); ++j) scores[j] = 0;
  Vec<S> sums = {};
  for (int64_t j = 0; j <= i; j += kLanes<S>) sums += load(scores + j);
  const double count = own.count[i];
  const S mean = count > 0 ? static_cast<S>(sum_lanes(sums) / count) : S(0);
  Vec<S> squares = {};
  for (int64_t j = 0; j <= i; j += kLanes<S>) {
    Vec<S> centred = (load(scores + j) - mean) * load(own.seen + j);
    if (j + kLanes<S> > i + 1) centred = with_rest<S>(centred, i + 1 - j, S(0));
    squares += centred * centred;
    store(scores + j, centred);
  }
  const int64_t last = whole(i + 1, kLanes<S>);
  clear(scores + last, kChunkKeys - last);
  return {count, mean, count_before * mean * mean + sum_lanes(squares)};
}

template <class T>
void load_rows(const void* from, const RowLayout& layout, int64_t first, int64_t count,
               int64_t features, int64_t stride, Acc<T>* to) {
  for (int64_t i = 0; i < count; ++i) {
    load_row(static_cast<const T*>(from) + row_offset(layout, first + i), features, stride,
             to + i * stride);
  }
  clear(to + count * stride, (kChunkKeys - count) * stride);
}

// Runs a pass over the heads of keys from `begin` to `end`.
template <template <class> class Pass, class Args>
void in_its_type(const Args& args, int64_t begin, int64_t end) {
  const auto with_type = [&](auto type) {
    Pass<decltype(type)> pass(args);
    for (int64_t unit = begin; unit < end; ++unit) pass.run(unit);
  };
  switch (args.dtype) {
    case DType::kFloat32:
      return with_type(float{});
    case DType::kFloat64:
      return with_type(double{});
    case DType::kBFloat16:
      return with_type(BFloat16{});
    case DType::kFloat16:
      return with_type(Float16{});
  }
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
