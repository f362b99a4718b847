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
        memory_(Keys<T>::doubles(stride_) + 3 * stride_ * stride_ + 6 * kChunkKeys * (stride_ + 8) +
                kChunkKeys * kChunkKeys + whole(args.keys, kChunkKeys) * stride_ +
                2 * whole(group_ * args.rows, 8) + 3 * (stride_ + 8) + 2 * kChunkKeys),
        keys_(args, memory_),
        symmetric_(memory_.take<S>(stride_ * stride_)),
        outer_(memory_.take<S>(stride_ * stride_)),
        whole_outer_(memory_.take<S>(stride_ * stride_)),
        q_(memory_.take<S>(kChunkKeys * stride_)),
        weighted_(memory_.take<S>(kChunkKeys * stride_)),
        products_(memory_.take<S>(kChunkKeys * stride_)),
        own_{memory_.take<S>(kChunkKeys * stride_), memory_.take<S>(kChunkKeys * stride_),
             memory_.take<S>(kChunkKeys * kChunkKeys), memory_.take<S>(kChunkKeys),
             memory_.take<double>(kChunkKeys)},
        of_keys_(memory_.take<S>(whole(args.keys, kChunkKeys) * stride_)),
        weights_(memory_.take<S>(group_ * args.rows)),
        about_(memory_.take<S>(group_ * args.rows)),
        origin_(memory_.take<double>(stride_)),
        sum_about_(memory_.take<S>(stride_)),
        grad_(memory_.take<S>(stride_)) {}

  void run(int64_t unit) {
    const int64_t batch = unit / args_.key_heads, head = unit % args_.key_heads;
    first_head_ = batch * args_.heads + head * group_;
    keys_.start(batch, head);
    clear(symmetric_, stride_ * stride_);
    clear(outer_, stride_ * stride_);
    clear(whole_outer_, stride_ * stride_);
    clear(sum_about_, stride_);
    args_.causal ? causal() : full();
  }

 private:
  void full() {
    keys_.join_all();
    to_symmetric(keys_.moments, args_.features, stride_, symmetric_);
    for (int64_t member = 0; member < group_; ++member) {
      for (int64_t first = 0; first < args_.rows; first += kChunkKeys) {
        const int64_t count = rows(member, first);
        add_outer(count);
      }
    }
    to_symmetric(outer_, args_.features, stride_, whole_outer_);
    for (int64_t first = 0; first < args_.keys; first += kChunkKeys) {
      keys_.load_chunk(first);
      set_own_keys(keys_, first, own_);
      clear(products_, kChunkKeys * stride_);
      multiply_add<Part::kAll, S>(kChunkKeys, stride_, args_.features, {own_.keys, stride_, 1},
                                  whole_outer_, stride_, products_, stride_);
      store_keys(first);
    }
  }

  void causal() {
    clear(of_keys_, whole(args_.keys, kChunkKeys) * stride_);
    find_origin();
    for (int64_t first = 0; first < args_.rows; first += kChunkKeys) {
      const int64_t seen = keys_.load_chunk(first);
      set_own_keys(keys_, first, own_);
      to_symmetric(keys_.moments, args_.features, stride_, symmetric_);
      for (int64_t member = 0; member < group_; ++member) {
        const int64_t count = rows(member, first);
        if (first < args_.keys) {
          multiply_add<Part::kUpperLeft, S>(kChunkKeys, stride_, whole(count, kTileRows),
                                            {own_.scores, 1, kChunkKeys}, weighted_, stride_,
                                            of_keys_ + first * stride_, stride_);
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
      to_symmetric(outer_, args_.features, stride_, whole_outer_);
    }
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
    for (int64_t j = 0; j < kChunkKeys; ++j) {
      S* const key = own_.keys + j * stride_;
      clear(key, stride_);
      if (!keys_.is_seen(first + j)) continue;
      const S* const from = keys_.row(first + j);
      for (int64_t i = 0; i < stride_; ++i) key[i] = static_cast<S>(from[i] - origin_[i]);
    }
    for (int64_t j = 0; j < kChunkKeys; ++j) {
      for (int64_t i = 0; i < stride_; ++i) {
        products_[j * stride_ + i] = of_keys_[(first + j) * stride_ + i] - sum_about_[i];
      }
    }
    multiply_add<Part::kAll, S>(kChunkKeys, stride_, args_.features, {own_.keys, stride_, 1},
                                whole_outer_, stride_, products_, stride_);
    store_keys(first);
  }

  // Adds a chunk's rows to what earlier chunks' keys need of them.
  void again(int64_t member, int64_t first) {
    const int64_t count = least(kChunkKeys, args_.rows - first);
    load_rows<T>(args_.q, args_.q_rows, (first_head_ + member) * args_.rows + first, count,
                 args_.features, stride_, q_);
    clear(weighted_, kChunkKeys * stride_);
    for (int64_t i = 0; i < count; ++i) {
      const S weight = weights_[member * args_.rows + first + i];
      const S about = about_[member * args_.rows + first + i];
      for (int64_t f = 0; f < stride_; ++f) {
        const S value = weight * q_[i * stride_ + f];
        weighted_[i * stride_ + f] = value;
        sum_about_[f] += value * about;
      }
    }
    add_outer(count);
  }

  void add_outer(int64_t count) {
    multiply_add<Part::kUpperResult, S>(whole(args_.features, kTileRows), stride_,
                                        whole(count, kTileRows), {q_, 1, stride_}, weighted_,
                                        stride_, outer_, stride_);
  }

  // The gradients of a chunk's queries; leaves q_, weighted_ (and, causal, the centred scores).
  int64_t rows(int64_t member, int64_t first) {
    const int64_t count = least(kChunkKeys, args_.rows - first);
    const int64_t row = (first_head_ + member) * args_.rows + first;
    load_rows<T>(args_.q, args_.q_rows, row, count, args_.features, stride_, q_);
    clear(products_, kChunkKeys * stride_);
    multiply_add<Part::kAll, S>(whole(count, kTileRows), stride_, args_.features, {q_, stride_, 1},
                                symmetric_, stride_, products_, stride_);
    OwnRow<S> seen[kChunkKeys];
    if (args_.causal) {
      clear(own_.scores, kChunkKeys * kChunkKeys);
      multiply_add<Part::kLowerResult, S>(whole(count, kTileRows), kChunkKeys, args_.features,
                                          {q_, stride_, 1}, own_.transposed, kChunkKeys,
                                          own_.scores, kChunkKeys);
      for (int64_t i = 0; i < kChunkKeys; ++i) {
        seen[i] = centre_scores<T>(keys_.count, own_, i);
      }
      multiply_add<Part::kLowerLeft, S>(whole(count, kTileRows), stride_, kChunkKeys,
                                        {own_.scores, kChunkKeys, 1}, own_.keys, stride_, products_,
                                        stride_);
    }
    clear(weighted_, kChunkKeys * stride_);
    const S tau = *static_cast<const S*>(args_.tau), eps = static_cast<S>(args_.eps);
    const S scales = static_cast<S>(2 * args_.scale * args_.scale);
    for (int64_t i = 0; i < count; ++i) {
      const S* const q = q_ + i * stride_;
      load_row(static_cast<const T*>(args_.grad_q) + row_offset(args_.grad_q_rows, row + i),
               args_.features, stride_, grad_);
      const S sigma = static_cast<const S*>(args_.deviation)[row + i];
      const S inverse = S(1) / attention_divisor(sigma, tau, eps);
      const S of_divisor = -dot(grad_, q, stride_) * inverse * inverse;
      static_cast<S*>(args_.of_divisor)[row + i] = of_divisor;
      const double keys = args_.causal ? seen[i].count : keys_.count;
      const S weight =
          keys < 2 ? S(0)
                   : through_sigma(of_divisor, sigma, tau, eps) * scales / static_cast<S>(keys);
      S* const product = products_ + i * stride_;
      for (int64_t f = 0; f < stride_; ++f) {
        weighted_[i * stride_ + f] = weight * q[f];
        product[f] = grad_[f] * inverse + weight * product[f];
      }
      if (args_.causal) {
        double before = 0;
        for (int64_t f = 0; f < stride_; ++f) before += q[f] * (keys_.mean[f] - origin_[f]);
        weights_[member * args_.rows + first + i] = weight;
        about_[member * args_.rows + first + i] = static_cast<S>(before) + seen[i].mean;
      }
      store_row(static_cast<T*>(args_.of_q) + (row + i) * args_.features, product, args_.features);
    }
    return count;
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
        for (int64_t f = 0; f < stride_; ++f) from[f] += grad_[f];
      }
      store_row(static_cast<T*>(args_.of_k) + row * args_.features, from, args_.features);
    }
  }

  const NormAttentionBackward& args_;
  int64_t stride_, group_;
  Memory memory_;
  Keys<T> keys_;
  S *symmetric_, *outer_, *whole_outer_, *q_, *weighted_, *products_;
  OwnKeys<S> own_;
  S *of_keys_, *weights_, *about_;
  double* origin_;
  S *sum_about_, *grad_;
  int64_t first_head_ = 0;
};

}  // namespace

void norm_attention_backward(const NormAttentionBackward& args, int64_t begin, int64_t end) {
  in_its_type<Backward>(args, begin, end);
}

}  // namespace effkern::cpu::EFFKERN_ISA
