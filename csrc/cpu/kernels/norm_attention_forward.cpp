// clang-format off: the vectors' functions must be declared before the formulas
#include "cpu/kernels/isa.h"
#include "cpu/kernels/quadratic_form.h"
// clang-format on
#include "math/norm_attention.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Float16 ends at 65,504, and a query over eps may be larger: no infinity comes of it.
template <class T>
EFFKERN_INLINE Vec<T> within_range(Vec<T> x) {
  if constexpr (__is_same(T, Float16)) {
    x = x > 65504.0f ? Vec<T>{} + 65504.0f : x;
    x = x < -65504.0f ? Vec<T>{} - 65504.0f : x;
  }
  return x;
}

template <class T>
class Forward {
 public:
  using S = Acc<T>;

  explicit Forward(const NormAttentionForward& args)
      : args_(args),
        stride_(whole(args.features, kTileColumns<float>)),
        memory_(Keys<T, double>::doubles(stride_) + Keys<T, S>::doubles(stride_) +
                OwnKeys<S>::doubles(stride_) + kChunkKeys * stride_ +
                QuadraticForm<S>::doubles(stride_)),
        keys_(args, memory_),
        all_(args, memory_),
        own_(stride_, memory_),
        q_(memory_.take<S>(kChunkKeys * stride_)),
        form_(args.features, stride_, memory_) {}

  // One head of keys with its heads of queries.
  void run(int64_t unit) {
    const int64_t batch = unit / args_.key_heads, head = unit % args_.key_heads;
    keys_.start(batch, head);
    if (!args_.causal) {
      all_.start(batch, head);
      all_.join_all();
      // Products of the smallest and the largest keys are out of float32's range.
      const double trace = all_.spread();
      if (trace > 1e-25 && trace < 1e35) {
        form_.set(all_.moments, trace);
      } else {
        const double* const moments = exact_moments();
        form_.set(moments, keys_.spread());
      }
    }
    const int64_t group = args_.heads / args_.key_heads;
    for (int64_t first = 0; first < args_.rows; first += kChunkKeys) {
      int64_t seen = 0;
      if (args_.causal) {
        seen = keys_.load_chunk(first);
        set_own_keys(keys_, first, own_);
        form_.set(keys_.moments, keys_.spread());
      }
      for (int64_t member = 0; member < group; ++member) {
        rows((batch * args_.heads + head * group + member) * args_.rows, first);
      }
      if (args_.causal) keys_.join_chunk(first, seen);
    }
    store_offset(unit);
  }

 private:
  void rows(int64_t head_row, int64_t first) {
    const int64_t count = least(kChunkKeys, args_.rows - first);
    load_rows<T>(args_.q, args_.q_rows, head_row + first, count, args_.features, stride_, q_);
    double squares[kChunkKeys];
    form_.squares(q_, count, squares, [&] { return exact_moments(); });
    if (args_.causal) score_own_keys(q_, count, args_.features, stride_, own_);
    const S tau = *static_cast<const S*>(args_.tau), eps = static_cast<S>(args_.eps);
    const double scale = args_.scale < 0 ? -args_.scale : args_.scale;
    for (int64_t i = 0; i < count; ++i) {
      double keys = all_.count;
      if (args_.causal) {
        const auto own = centre_scores(keys_.count, own_, i);
        squares[i] += own.squares;
        keys = own.count;
      }
      const S sigma = keys < 2 ? static_cast<S>(__builtin_inf())
                               : static_cast<S>(square_root(squares[i] / keys) * scale);
      static_cast<S*>(args_.deviation)[head_row + first + i] = sigma;
      const S inverse = S(1) / attention_divisor(sigma, tau, eps);
      T* const to = static_cast<T*>(args_.scaled) + (head_row + first + i) * args_.features;
      S* const from = q_ + i * stride_;
      for (int64_t f = 0; f < stride_; f += kLanes<T>) {
        store(from + f, within_range<T>(load(from + f) * inverse));
      }
      store_row(to, from, args_.features);
    }
  }

  // Those of the keys before a causal chunk, or of all keys.
  const double* exact_moments() {
    if (!args_.causal && keys_.count == 0) keys_.join_all();
    return keys_.moments;
  }

  // See `offset` in effkern/backends/reference/norm_attention.py.
  void store_offset(int64_t unit) {
    S* const offset = q_;
    clear(offset, stride_);
    if (!args_.causal) {
      offset_of_all(offset);
    } else if (sizeof(T) >= sizeof(float)) {
      offset_of_the_first_two(offset);
    }
    store_row(static_cast<T*>(args_.offset) + unit * args_.features, offset, args_.features);
  }

  void offset_of_all(S* offset) const {
    if (!(dot(all_.mean, all_.mean, stride_) * all_.count > 4 * all_.spread())) return;
    convert(all_.mean, stride_, offset);
  }

  void offset_of_the_first_two(S* offset) {
    int64_t places[2] = {0, 0}, found = 0;
    for (int64_t j = 0; j < args_.keys && found < 2; ++j) {
      if (keys_.is_seen(j)) places[found++] = j;
    }
    if (found == 0) return;
    if (found == 1) places[1] = places[0];
    S *const first = q_ + stride_, *const second = q_ + 2 * stride_,
             *const between = q_ + 3 * stride_;
    keys_.load_key(places[0], first);
    keys_.load_key(places[1], second);
    for (int64_t i = 0; i < stride_; ++i) between[i] = first[i] - second[i];
    const S a = dot(first, first, stride_), b = dot(second, second, stride_);
    if (!((a < b ? a : b) > 16 * dot(between, between, stride_))) return;
    for (int64_t i = 0; i < stride_; ++i) offset[i] = first[i];
  }

  const NormAttentionForward& args_;
  int64_t stride_;
  Memory memory_;
  Keys<T, double> keys_;  // causal: all; else only of heads with rows whose terms cancel
  Keys<T, S> all_;        // not causal
  OwnKeys<S> own_;
  S* q_;
  QuadraticForm<S> form_;
};

}  // namespace

void norm_attention_forward(const NormAttentionForward& args, int64_t begin, int64_t end) {
  in_its_type<Forward>(args, begin, end);
}

}  // namespace effkern::cpu::EFFKERN_ISA
