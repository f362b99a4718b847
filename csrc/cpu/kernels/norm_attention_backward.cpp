// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/attention_keys.h"
// clang-format on
#include "math/norm_attention.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

template <class T>
class Backward {
 public:
  using S = Acc<T>;

  explicit Backward(const NormAttentionBackward& args)
      : args_(args),
        stride_(whole(args.features, kTileColumns<float>)),
        group_(args.heads / args.key_heads),
        memory_(Keys<T, double>::doubles(stride_) + OwnKeys<S>::doubles(stride_) +
                3 * stride_ * stride_ + (4 * kChunkKeys + whole(args.keys, kChunkKeys)) * stride_ +
                2 * whole(group_ * args.rows, 8) + 4 * (stride_ + 8)),
        keys_(args, memory_),
        own_(stride_, memory_),
        symmetric_(memory_.take<S>(stride_ * stride_)),
        outer_(memory_.take<S>(stride_ * stride_)),
        whole_outer_(memory_.take<S>(stride_ * stride_)),
        q_(memory_.take<S>(kChunkKeys * stride_)),
        weighted_(memory_.take<S>(kChunkKeys * stride_)),
        products_(memory_.take<S>(kChunkKeys * stride_)),
        of_queries_(memory_.take<S>(kChunkKeys * stride_)),
        of_keys_(memory_.take<S>(whole(args.keys, kChunkKeys) * stride_)),
        weights_(memory_.take<S>(group_ * args.rows)),
        about_(memory_.take<S>(group_ * args.rows)),
        origin_(memory_.take<double>(stride_)),
        from_origin_(memory_.take<S>(stride_)),
        sum_about_(memory_.take<S>(stride_)),
        grad_(memory_.take<S>(stride_)) {}

  void run(int64_t unit) {
    const int64_t batch = unit / args_.key_heads, head = unit % args_.key_heads;
    first_head_ = batch * args_.heads + head * group_;
    keys_.start(batch, head);
    clear(outer_, stride_ * stride_);
    clear(sum_about_, stride_);
    args_.causal ? causal() : full();
  }

 private:
  void full() {
    keys_.join_all();
    set_symmetric();
    for (int64_t member = 0; member < group_; ++member) {
      for (int64_t first = 0; first < args_.rows; first += kChunkKeys) {
        const int64_t count = rows(member, first);
        add_outer(count);
      }
    }
    set_whole_outer();
    for (int64_t first = 0; first < args_.keys; first += kChunkKeys) {
      keys_.load_chunk(first);
      keys_.take_off(keys_.mean, first, own_.keys);
      multiply<Part::kAll, Onto::kNothing, S>(kChunkKeys, stride_, args_.features,
                                              {own_.keys, stride_, 1}, whole_outer_, stride_,
                                              products_, stride_);
      store_keys(first);
    }
  }

  void causal() {
    clear(of_keys_, whole(args_.keys, kChunkKeys) * stride_);
    find_origin();
    for (int64_t first = 0; first < args_.rows; first += kChunkKeys) {
      const int64_t seen = keys_.load_chunk(first);
      set_own_keys(keys_, first, own_);
      set_symmetric();
      for (int64_t i = 0; i < stride_; ++i) {
        from_origin_[i] = static_cast<S>(keys_.mean[i] - origin_[i]);
      }
      for (int64_t member = 0; member < group_; ++member) {
        const int64_t count = rows(member, first);
        if (count > 0 && first < args_.keys) {
          multiply<Part::kUpperLeft, Onto::kSum, S>(kChunkKeys, stride_, whole(count, kTileRows),
                                                    {own_.scores, 1, kChunkKeys}, weighted_,
                                                    stride_, of_keys_ + first * stride_, stride_);
        }
      }
      keys_.join_chunk(first, seen);
    }
    // The rows of later chunks see all of a chunk's keys.
    const int64_t chunks = (args_.rows > args_.keys ? args_.rows : args_.keys) + kChunkKeys - 1;
    for (int64_t first = chunks / kChunkKeys * kChunkKeys - kChunkKeys; first >= 0;
         first -= kChunkKeys) {
      if (first < args_.keys) later_rows(first);
      if (first >= args_.rows) continue;
      for (int64_t member = 0; member < group_; ++member) again(member, first);
    }
  }

  void set_symmetric() {
    convert(keys_.moments, stride_ * stride_, symmetric_);
    make_symmetric(symmetric_, stride_, stride_);
  }

  void set_whole_outer() {
    __builtin_memcpy(whole_outer_, outer_, static_cast<size_t>(stride_ * stride_) * sizeof(S));
    make_symmetric(whole_outer_, stride_, stride_);
  }

  // Keys are taken from here: nearer to them than zero may be.
  void find_origin() {
    clear(origin_, stride_);
    for (int64_t first = 0; first < args_.keys; first += kChunkKeys) {
      const int64_t seen = keys_.load_chunk(first);
      if (seen == 0) continue;
      __builtin_memcpy(origin_, keys_.mean_of_chunk(seen),
                       static_cast<size_t>(stride_) * sizeof(double));
      return;
    }
  }

  void later_rows(int64_t first) {
    keys_.load_chunk(first);
    keys_.take_off(origin_, first, own_.keys);
    for (int64_t j = 0; j < kChunkKeys; ++j) {
      for (int64_t i = 0; i < stride_; i += kLanes<S>) {
        store(products_ + j * stride_ + i,
              load(of_keys_ + (first + j) * stride_ + i) - load(sum_about_ + i));
      }
    }
    set_whole_outer();
    multiply<Part::kAll, Onto::kSum, S>(kChunkKeys, stride_, args_.features,
                                        {own_.keys, stride_, 1}, whole_outer_, stride_, products_,
                                        stride_);
    store_keys(first);
  }

  // Adds a chunk's rows to what earlier chunks' keys need of them.
  void again(int64_t member, int64_t first) {
    const int64_t count = least(kChunkKeys, args_.rows - first);
    const S *const weights = weights_ + member * args_.rows + first, *const about =
                                                                         about_ +
                                                                         member * args_.rows +
                                                                         first;
    bool any = false;
    for (int64_t i = 0; i < count; ++i) any |= weights[i] != 0;
    if (!any) return;
    load_rows<T>(args_.q, args_.q_rows, (first_head_ + member) * args_.rows + first, count,
                 args_.features, stride_, q_);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t f = 0; f < stride_; f += kLanes<S>) {
        const Vec<S> value = weights[i] * load(q_ + i * stride_ + f);
        store(weighted_ + i * stride_ + f, value);
        store(sum_about_ + f, load(sum_about_ + f) + value * about[i]);
      }
    }
    clear(weighted_ + count * stride_, (whole(count, kTileRows) - count) * stride_);
    add_outer(count);
  }

  void add_outer(int64_t count) {
    multiply<Part::kUpperResult, Onto::kSum, S>(whole(args_.features, kTileRows), stride_,
                                                whole(count, kTileRows), {q_, 1, stride_},
                                                weighted_, stride_, outer_, stride_);
  }

  // The gradients of a chunk's queries. The rows with a gradient through sigma are left in q_ and
  // weighted_, and their number is returned: in causal attention all or none, at their places and
  // with their centred scores, else without the others.
  int64_t rows(int64_t member, int64_t first) {
    const int64_t count = least(kChunkKeys, args_.rows - first);
    const int64_t row = (first_head_ + member) * args_.rows + first;
    load_rows<T>(args_.q, args_.q_rows, row, count, args_.features, stride_, q_);
    S weights[kChunkKeys];
    if (!through_divisors(row, count, weights)) {
      if (args_.causal) keep_weights(member * args_.rows + first, count, weights, nullptr);
      store_queries(row, count);
      return 0;
    }
    int64_t places[kChunkKeys], found = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (args_.causal || weights[i] != 0) places[found++] = i;
    }
    for (int64_t i = 0; i < found; ++i) {
      const S* const from = q_ + places[i] * stride_;
      for (int64_t f = 0; f < stride_; f += kLanes<S>) {
        const Vec<S> q = load(from + f);
        store(q_ + i * stride_ + f, q);
        store(weighted_ + i * stride_ + f, weights[places[i]] * q);
      }
    }
    const int64_t tiles = whole(found, kTileRows);
    clear(q_ + found * stride_, (tiles - found) * stride_);
    clear(weighted_ + found * stride_, (tiles - found) * stride_);
    multiply<Part::kAll, Onto::kNothing, S>(tiles, stride_, args_.features, {q_, stride_, 1},
                                            symmetric_, stride_, products_, stride_);
    if (args_.causal) {
      OwnRow<S> seen[kChunkKeys];
      score_own_keys(q_, count, args_.features, stride_, own_);
      for (int64_t i = 0; i < tiles; ++i) seen[i] = centre_scores(keys_.count, own_, i);
      multiply<Part::kLowerLeft, Onto::kSum, S>(tiles, stride_, kChunkKeys,
                                                {own_.scores, kChunkKeys, 1}, own_.keys, stride_,
                                                products_, stride_);
      keep_weights(member * args_.rows + first, count, weights, seen);
    }
    for (int64_t i = 0; i < found; ++i) {
      S* const of_query = of_queries_ + places[i] * stride_;
      for (int64_t f = 0; f < stride_; f += kLanes<S>) {
        store(of_query + f,
              load(of_query + f) + weights[places[i]] * load(products_ + i * stride_ + f));
      }
    }
    store_queries(row, count);
    return found;
  }

  // Into of_queries_: the gradients as if sigma were constant. Into `weights`: w of each row;
  // whether there is one.
  bool through_divisors(int64_t row, int64_t count, S* weights) {
    const S tau = *static_cast<const S*>(args_.tau), eps = static_cast<S>(args_.eps);
    const S scales = static_cast<S>(2 * args_.scale * args_.scale);
    bool any = false;
    for (int64_t i = 0; i < count; ++i) {
      S* const grad = of_queries_ + i * stride_;
      load_row(static_cast<const T*>(args_.grad_q) + row_offset(args_.grad_q_rows, row + i),
               args_.features, stride_, grad);
      const S sigma = static_cast<const S*>(args_.deviation)[row + i];
      const S inverse = S(1) / attention_divisor(sigma, tau, eps);
      const S of_divisor = -dot(grad, q_ + i * stride_, stride_) * inverse * inverse;
      static_cast<S*>(args_.of_divisor)[row + i] = of_divisor;
      const double keys = args_.causal ? own_.count[i] : keys_.count;
      weights[i] = keys < 2
                       ? S(0)
                       : through_sigma(of_divisor, sigma, tau, eps) * scales / static_cast<S>(keys);
      any |= weights[i] != 0;
      for (int64_t f = 0; f < stride_; f += kLanes<S>) store(grad + f, load(grad + f) * inverse);
    }
    return any;
  }

  // What the second pass of causal attention wants of rows from `first` on; null: nothing is seen
  // with a weight.
  void keep_weights(int64_t first, int64_t count, const S* weights, const OwnRow<S>* seen) {
    for (int64_t i = 0; i < count; ++i) {
      weights_[first + i] = weights[i];
      about_[first + i] = seen ? dot(q_ + i * stride_, from_origin_, stride_) + seen[i].mean : S(0);
    }
  }

  void store_queries(int64_t row, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      store_row(static_cast<T*>(args_.of_q) + (row + i) * args_.features, of_queries_ + i * stride_,
                args_.features);
    }
  }

  // The gradients of a chunk's keys, from products_.
  void store_keys(int64_t first) {
    const int64_t last = least(first + kChunkKeys, args_.keys);
    for (int64_t key = first; key < last; ++key) {
      S* const from = products_ + (key - first) * stride_;
      const int64_t row = keys_.first_row() + key;
      if (!keys_.is_seen(key)) {
        clear(from, stride_);
      } else if (args_.grad_k) {
        load_row(static_cast<const T*>(args_.grad_k) + row_offset(args_.grad_k_rows, row),
                 args_.features, stride_, grad_);
        for (int64_t f = 0; f < stride_; f += kLanes<S>) {
          store(from + f, load(from + f) + load(grad_ + f));
        }
      }
      store_row(static_cast<T*>(args_.of_k) + row * args_.features, from, args_.features);
    }
  }

  const NormAttentionBackward& args_;
  int64_t stride_, group_;
  Memory memory_;
  Keys<T, double> keys_;
  OwnKeys<S> own_;
  S *symmetric_, *outer_, *whole_outer_, *q_, *weighted_, *products_, *of_queries_;
  S *of_keys_, *weights_, *about_;
  double* origin_;  // keys are taken from here: nearer to them than zero may be
  S* from_origin_;  // the mean of the keys before a chunk
  S *sum_about_, *grad_;
  int64_t first_head_ = 0;
};

}  // namespace

void norm_attention_backward(const NormAttentionBackward& args, int64_t begin, int64_t end) {
  in_its_type<Backward>(args, begin, end);
}

}  // namespace effkern::cpu::EFFKERN_ISA
