// The keys of a head, their moments, and how a chunk of rows sees them: what both passes of
// NormSoftmax attention share. cpu/kernels/isa.h must come first.
#pragma once

#include "cpu/kernels/multiply.h"
#include "cpu/kernels/scratch.h"
#include "math/norm_attention.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Keys (and rows) that are taken together.
constexpr int64_t kChunkKeys = 64;

// A vector's numbers as doubles.
template <class S>
constexpr int64_t kParts = kLanes<S> / kLanes<double>;
EFFKERN_INLINE void widen(Floats x, Doubles (&to)[2]) {
  const DoublesPair wide = widened(x);
  to[0] = wide.low, to[1] = wide.high;
}
EFFKERN_INLINE void widen(Doubles x, Doubles (&to)[1]) { to[0] = x; }

// Each number in another type.
template <class From, class To>
void convert(const From* __restrict from, int64_t count, To* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// The keys of one head, and what is known of those that have been added. Products of a chunk's keys
// are of type P, float or double; chunks are joined in double precision.
template <class T, class P>
class Keys {
 public:
  using S = Acc<T>;

  Keys(const NormAttentionTask& task, Memory& memory)
      : task_(task),
        stride_(whole(task.features, kTileColumns<float>)),
        chunk_mean_(memory.take<double>(stride_)),
        centred_(memory.take<P>(kChunkKeys * stride_)),
        products_(memory.take<P>(stride_ * stride_)),
        near_(memory.take<S>(stride_)),
        rest_(memory.take<S>(stride_)),
        mean(memory.take<double>(stride_)),
        moments(memory.take<double>(stride_ * stride_)),
        chunk(memory.take<S>(kChunkKeys * stride_)) {}

  static int64_t doubles(int64_t stride) {
    return 4 * (stride + 8) + 2 * stride * stride + 2 * kChunkKeys * stride;
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
      load_key(key, near_);
      convert(near_, stride_, mean);
      return;
    }
  }

  bool is_seen(int64_t key) const { return key < task_.keys && (!seen_ || seen_[key]); }

  void load_key(int64_t key, S* to) const {
    load_row(static_cast<const T*>(task_.k) + row_offset(task_.k_rows, first_row_ + key),
             task_.features, stride_, to);
  }

  int64_t first_row() const { return first_row_; }

  // Brings a chunk near: `chunk` holds it, zeros for what is hidden. Its number of seen keys.
  int64_t load_chunk(int64_t first) {
    int64_t seen = 0;
    for (int64_t j = 0; j < kChunkKeys; ++j) {
      if (is_seen(first + j)) {
        load_key(first + j, chunk + j * stride_);
        ++seen;
      } else {
        clear(chunk + j * stride_, stride_);
      }
    }
    return seen;
  }

  // The mean of a loaded chunk's keys.
  const double* mean_of_chunk(int64_t seen) {
    for (int64_t i = 0; i < stride_; i += kLanes<S>) {
      Doubles sums[kParts<S>] = {}, key[kParts<S>];
      for (int64_t j = 0; j < kChunkKeys; ++j) {
        widen(load(chunk + j * stride_ + i), key);
        for (int64_t part = 0; part < kParts<S>; ++part) sums[part] += key[part];
      }
      for (int64_t part = 0; part < kParts<S>; ++part) {
        store(chunk_mean_ + i + part * kLanes<double>, sums[part] / static_cast<double>(seen));
      }
    }
    return chunk_mean_;
  }

  // A loaded chunk's keys less `origin`; zeros for what is hidden.
  void take_off(const double* origin, int64_t first, S* to) {
    // What a number of S leaves of the origin is taken off after: the key is rounded once.
    convert(origin, stride_, near_);
    for (int64_t i = 0; i < stride_; ++i) rest_[i] = static_cast<S>(origin[i] - near_[i]);
    for (int64_t j = 0; j < kChunkKeys; ++j) {
      S* const key = to + j * stride_;
      if (!is_seen(first + j)) {
        clear(key, stride_);
        continue;
      }
      for (int64_t i = 0; i < stride_; i += kLanes<S>) {
        store(key + i, (load(chunk + j * stride_ + i) - load(near_ + i)) - load(rest_ + i));
      }
    }
  }

  // Joins a loaded chunk to the others. Of the moments what stands on and above the diagonal is
  // kept; below it stands anything.
  void join_chunk(int64_t first, int64_t seen) {
    if (seen == 0) return;
    mean_of_chunk(seen);
    add_products(first);
    const double n_b = static_cast<double>(seen), weight = joining_weight(count, n_b);
    for (int64_t i = 0; i < stride_; ++i) chunk_mean_[i] -= mean[i];
    for (int64_t a = 0; count > 0 && a < task_.features; ++a) {
      const double factor = weight * chunk_mean_[a];
      double* const to = moments + a * stride_;
      for (int64_t b = a / kLanes<double> * kLanes<double>; b < stride_; b += kLanes<double>) {
        store(to + b, load(to + b) + factor * load(chunk_mean_ + b));
      }
    }
    for (int64_t i = 0; i < stride_; ++i) mean[i] += n_b / (count + n_b) * chunk_mean_[i];
    count += n_b;
  }

  void join_all() {
    for (int64_t first = 0; first < task_.keys; first += kChunkKeys) {
      join_chunk(first, load_chunk(first));
    }
  }

  // The sum of the keys' squared distances from their mean.
  double spread() const {
    double sum = 0;
    for (int64_t a = 0; a < task_.features; ++a) sum += moments[a * stride_ + a];
    return sum;
  }

 private:
  // Adds those of a chunk's keys less its mean.
  void add_products(int64_t first) {
    const int64_t rows = whole(task_.features, kTileRows);
    if constexpr (sizeof(P) == sizeof(double)) {
      centre_in_double(first);
      multiply<Part::kUpperResult, Onto::kSum, P>(rows, stride_, kChunkKeys, {centred_, 1, stride_},
                                                  centred_, stride_, moments, stride_);
    } else {
      take_off(chunk_mean_, first, centred_);
      multiply<Part::kUpperResult, Onto::kNothing, P>(
          rows, stride_, kChunkKeys, {centred_, 1, stride_}, centred_, stride_, products_, stride_);
      for (int64_t a = 0; a < task_.features; ++a) {
        for (int64_t b = a / kLanes<P> * kLanes<P>; b < stride_; b += kLanes<P>) {
          Doubles wide[kParts<P>];
          widen(load(products_ + a * stride_ + b), wide);
          for (int64_t part = 0; part < kParts<P>; ++part) {
            double* const to = moments + a * stride_ + b + part * kLanes<double>;
            store(to, load(to) + wide[part]);
          }
        }
      }
    }
  }

  void centre_in_double(int64_t first) {
    for (int64_t j = 0; j < kChunkKeys; ++j) {
      double* const to = centred_ + j * stride_;
      if (!is_seen(first + j)) {
        clear(to, stride_);
        continue;
      }
      Doubles key[kParts<S>];
      for (int64_t i = 0; i < stride_; i += kLanes<S>) {
        widen(load(chunk + j * stride_ + i), key);
        for (int64_t part = 0; part < kParts<S>; ++part) {
          const int64_t at = i + part * kLanes<double>;
          store(to + at, key[part] - load(chunk_mean_ + at));
        }
      }
    }
  }

  const NormAttentionTask& task_;
  int64_t stride_;
  double* chunk_mean_;
  P *centred_, *products_;
  S *near_, *rest_;
  int64_t first_row_ = 0;
  const uint8_t* seen_ = nullptr;

 public:
  double* mean;
  double* moments;
  S* chunk;
  double count = 0;
};

// ---- a chunk's own keys, as its rows see them ----

template <class S>
struct OwnKeys {
  S* keys;        // (kChunkKeys, stride): less the mean of those before; zeros for what is hidden
  S* transposed;  // (stride, kChunkKeys)
  S* scores;      // (kChunkKeys rows, kChunkKeys)
  S* seen;        // (kChunkKeys): one or zero
  double* count;  // (kChunkKeys): of the keys up to each, those before included

  OwnKeys(int64_t stride, Memory& memory)
      : keys(memory.take<S>(kChunkKeys * stride)),
        transposed(memory.take<S>(stride * kChunkKeys)),
        scores(memory.take<S>(kChunkKeys * kChunkKeys)),
        seen(memory.take<S>(kChunkKeys)),
        count(memory.take<double>(kChunkKeys)) {}

  static int64_t doubles(int64_t stride) {
    return 2 * kChunkKeys * stride + kChunkKeys * kChunkKeys + 2 * kChunkKeys;
  }
};

// From a loaded chunk of keys.
template <class T, class P>
void set_own_keys(Keys<T, P>& keys, int64_t first, OwnKeys<Acc<T>>& own) {
  double count = keys.count;
  for (int64_t j = 0; j < kChunkKeys; ++j) {
    const bool seen = keys.is_seen(first + j);
    own.seen[j] = seen ? 1 : 0;
    own.count[j] = count += seen ? 1 : 0;
  }
  keys.take_off(keys.mean, first, own.keys);
  transpose(own.keys, kChunkKeys, keys.stride(), keys.stride(), own.transposed, kChunkKeys);
}

// The scores of a chunk's rows with its own keys; what stands behind a row's own key is not used.
template <class S>
void score_own_keys(const S* q, int64_t count, int64_t features, int64_t stride, OwnKeys<S>& own) {
  multiply<Part::kLowerResult, Onto::kNothing, S>(whole(count, kTileRows), kChunkKeys, features,
                                                  {q, stride, 1}, own.transposed, kChunkKeys,
                                                  own.scores, kChunkKeys);
}

template <class S>
struct OwnRow {
  double count;  // of keys that the row sees
  S mean;        // of its scores, those before included
  double squares;
};

// Row `i` of the scores: what it does not see becomes zero as far as products of a triangle's tiles
// read, the rest loses its mean. Scores of hidden keys are zero.
template <class S>
OwnRow<S> centre_scores(double count_before, const OwnKeys<S>& own, int64_t i) {
  constexpr int64_t kStep = kLanes<S> > kTileRows ? kLanes<S> : kTileRows;
  Vec<S> lane = {};
  for (int64_t j = 0; j < kLanes<S>; ++j) lane[j] = static_cast<S>(j);
  S* const scores = own.scores + i * kChunkKeys;
  const S last = static_cast<S>(i);
  Vec<S> sums = {}, squares = {};
  for (int64_t j = 0; j <= i; j += kLanes<S>) {
    const Vec<S> place = lane + static_cast<S>(j), score = load(scores + j);
    sums += place > last ? Vec<S>{} : score;
  }
  const double count = own.count[i];
  const S mean = count > 0 ? static_cast<S>(sum_lanes(sums) / count) : S(0);
  for (int64_t j = 0; j < whole(i + 1, kStep); j += kLanes<S>) {
    const Vec<S> place = lane + static_cast<S>(j), score = load(scores + j);
    const Vec<S> centred = place > last ? Vec<S>{} : (score - mean) * load(own.seen + j);
    squares += centred * centred;
    store(scores + j, centred);
  }
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
