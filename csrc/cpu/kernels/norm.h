// Norms of rows, a row at a time: the first pass over a row brings it into the nearest cache and
// the others find it there, so each byte of memory is read once and written once. What the .cpp
// file of a formula instantiates. cpu/kernels/isa.h must come first.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/rows.h"
#include "math/norm.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// The storage type of a weight that is not there.
struct NoWeight {};

// A number as a type.
template <int kNumber>
struct Count {
  static constexpr int kCount = kNumber;
};

// Calls body with a number of args.sums() or of a flag as a type, which may be known already.
template <class W, class Body>
EFFKERN_INLINE void with_sums(int sums, const Body& body) {
  if constexpr (!__is_same(W, NoWeight)) {
    if (sums == 2) return body(Count<2>{});
    if (sums == 1) return body(Count<1>{});
  }
  body(Count<0>{});
}
template <class W, int kSums, class Body>
EFFKERN_INLINE void with_sums(Count<kSums> sums, const Body& body) {
  body(sums);
}
template <class Body>
EFFKERN_INLINE void with_flag(bool flag, const Body& body) {
  flag ? body(Count<1>{}) : body(Count<0>{});
}
template <int kFlag, class Body>
EFFKERN_INLINE void with_flag(Count<kFlag> flag, const Body& body) {
  body(flag);
}

template <class W, class V>
EFFKERN_INLINE V weighted(V v, const W* weight, int64_t i, int64_t count) {
  if constexpr (__is_same(W, NoWeight)) {
    return v;
  } else {
    return v * load_some(weight + i, count);
  }
}

// What was normalised, from the y at `i` and the numbers kept of its row.
template <class N, class T, class W>
EFFKERN_INLINE Vec<T> restored_at(const T* y, const W* weight, const W* bias, int64_t i,
                                  int64_t count, NormRow<Acc<T>> numbers,
                                  NormBounds<Acc<T>> bounds) {
  Vec<T> xhat = load_some(y + i, count);
  if constexpr (!__is_same(W, NoWeight)) {
    Vec<T> of_weight = load_some(weight + i, count), of_bias = {};
    // Past the end of the row stand zeros, by which nothing is divided.
    if (count < kLanes<T>) of_weight = with_rest<T>(of_weight, count, 1);
    if (bias) of_bias = load_some(bias + i, count);
    xhat = xhat_of(xhat, of_weight, of_bias, bounds);
  }
  return N::restored(xhat, numbers);
}

template <class V>
EFFKERN_INLINE NormSums<V> merged(const NormSums<V>& a, const NormSums<V>& b) {
  return {a.first + b.first, a.second + b.second};
}

// See `over_row`.
template <class T, int kUnrolled = kSlots, class Add>
EFFKERN_INLINE NormSums<Acc<T>> sums_over(int64_t features, const Add& add) {
  using Sums = NormSums<Vec<T>>;
  const auto merge = [](const Sums& a, const Sums& b) EFFKERN_LAMBDA { return merged(a, b); };
  const Sums all = over_row<T, kUnrolled>(features, Sums{}, merge, add);
  return {sum_lanes(all.first), sum_lanes(all.second)};
}

// The features at `i` of a normalised row, with weight and bias.
template <bool kBias, class W, class V>
EFFKERN_INLINE V affine(V v, const W* weight, const W* bias, int64_t i, int64_t count) {
  v = weighted(v, weight, i, count);
  if constexpr (kBias) v += load_some(bias + i, count);
  return v;
}

// The numbers kept of a row, if any are: where there are two, all rows' first ones stand before the
// others.
template <class N, class S>
EFFKERN_INLINE void keep(void* statistics, int64_t rows, int64_t row, NormRow<S> numbers) {
  if (!statistics) return;
  S* const p = static_cast<S*>(statistics) + row;
  if constexpr (N::kNumbers == 2) p[0] = numbers.first;
  p[(N::kNumbers - 1) * rows] = numbers.rstd;
}
template <class N, class S>
EFFKERN_INLINE NormRow<S> kept_of(const void* statistics, int64_t rows, int64_t row) {
  const S* const p = static_cast<const S*>(statistics) + row;
  return {N::kNumbers == 2 ? p[0] : S(0), p[(N::kNumbers - 1) * rows]};
}

// Which of its parts a kernel has is decided anew for each row, before the loops over its vectors:
// one function with all loops is a fraction of one for each choice of parts.
template <class N, class T, bool kResidual>
void forward_rows(const NormForward& args, int64_t begin, int64_t end) {
  using S = Acc<T>;
  const int64_t features = args.features;
  const bool y_streamed = is_streamed<T>(args.y, args.rows, features);
  const bool total_streamed = kResidual && is_streamed<T>(args.total, args.rows, features);

  for (int64_t row = begin; row < end; ++row) {
    const T* const x = static_cast<const T*>(args.x) + row_offset(args.x_rows, row);
    const T* residual = nullptr;
    if constexpr (kResidual) {
      residual = static_cast<const T*>(args.residual) + row_offset(args.residual_rows, row);
    }
    const auto total_at = [&](int64_t i, int64_t count) EFFKERN_LAMBDA {
      Vec<T> v = load_some(x + i, count);
      if constexpr (kResidual) v = rounded_to<T>(v + load_some(residual + i, count));
      return v;
    };

    S origin = 0;
    if constexpr (N::kHasOrigin) {
      const int64_t first = features < kOriginFeatures ? features : kOriginFeatures;
      Vec<T> sum = {};
      for_each_vector<T, 1>(
          first, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA { sum += total_at(i, count); });
      origin = sum_lanes(sum) / static_cast<S>(first);
    }
    const auto add = [&](NormSums<Vec<T>>& sums, int64_t i, int64_t count) EFFKERN_LAMBDA {
      Vec<T> v = total_at(i, count);
      // Past the end of the row stand zeros; at the origin they add nothing.
      if constexpr (N::kHasOrigin) v = count == kLanes<T> ? v : with_rest<T>(v, count, origin);
      N::add_forward(sums, v, origin);
    };
    NormSums<S> sums;
    for (bool again = false;; again = true) {
      sums = sums_over<T>(features, add);
      if constexpr (N::kHasOrigin) {
        if (!again && N::is_far(sums, features)) {
          origin = N::mean(sums, origin, features);
          continue;
        }
      }
      break;
    }
    const NormRow<S> numbers = N::kept(sums, origin, features, static_cast<S>(args.eps));
    keep<N>(args.statistics, args.rows, row, numbers);

    T* const y = static_cast<T*>(args.y) + row * features;
    T* const total = static_cast<T*>(args.total) + (kResidual ? row * features : 0);
    const auto write = [&](auto has_bias, const auto* weight, const auto* bias) EFFKERN_LAMBDA {
      constexpr bool kBias = decltype(has_bias)::kCount != 0;
      for_each_vector<T>(features, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
        const Vec<T> v = total_at(i, count);
        if constexpr (kResidual) put(total + i, v, count, total_streamed);
        const Vec<T> xhat = N::normalised(v, numbers);
        put(y + i, affine<kBias>(xhat, weight, bias, i, count), count, y_streamed);
      });
    };
    const auto write_with = [&](auto stored) EFFKERN_LAMBDA {
      const auto* const weight = static_cast<const decltype(stored)*>(args.weight);
      const auto* const bias = static_cast<const decltype(stored)*>(args.bias);
      bias ? write(Count<1>{}, weight, bias) : write(Count<0>{}, weight, bias);
    };
    if (!args.weight) {
      write(Count<0>{}, static_cast<const NoWeight*>(nullptr),
            static_cast<const NoWeight*>(nullptr));
    } else if (args.weight_dtype == args.dtype) {
      write_with(T{});
    } else {
      write_with(S{});
    }
  }
  if (y_streamed || total_streamed) finish_streams();
}

// `share` takes the rows' part of kSums sums for each feature, one after another, zero before the
// first row. `number_of_sums` and `has_grad_total` are numbers, of which there is one loop each in
// here, or types.
template <class N, class T, class W, bool kFromY, class Sums, class Flag>
void backward_rows(const NormBackward& args, Sums number_of_sums, Flag has_grad_total,
                   Acc<T>* share, int64_t begin, int64_t end) {
  using S = Acc<T>;
  // What is divided by the weight waits for that, not for its sums.
  constexpr int kUnrolled = kFromY && !__is_same(W, NoWeight) ? 1 : kSlots;
  const int64_t features = args.features;
  const W* const weight = static_cast<const W*>(args.weight);
  const W* const bias = static_cast<const W*>(args.bias);
  const NormBounds<S> bounds = {static_cast<S>(least_beside_bias(args.dtype)),
                                static_cast<S>(least_weight(args.dtype))};
  const bool streamed = args.grad_x && is_streamed<T>(args.grad_x, args.rows, features);

  for (int64_t row = begin; row < end; ++row) {
    const T* const grad = static_cast<const T*>(args.grad) + row_offset(args.grad_rows, row);
    const T* const x = static_cast<const T*>(args.x) + row_offset(args.x_rows, row);
    const NormRow<S> numbers = kept_of<N, S>(args.statistics, args.rows, row);

    const auto normalised_at = [&](int64_t i, int64_t count) EFFKERN_LAMBDA {
      if constexpr (kFromY) {
        return restored_at<N, T>(x, weight, bias, i, count, numbers, bounds);
      } else {
        return load_some(x + i, count);
      }
    };

    NormSums<S> sums;
    with_sums<W>(number_of_sums, [&](auto number) EFFKERN_LAMBDA {
      constexpr int kSums = decltype(number)::kCount;
      const auto add = [&](NormSums<Vec<T>>& sums, int64_t i, int64_t count) EFFKERN_LAMBDA {
        const Vec<T> g = load_some(grad + i, count), v = normalised_at(i, count);
        N::add_backward(sums, weighted(g, weight, i, count), v, numbers);
        if constexpr (kSums >= 1) {
          S* const p = share + i;
          store_some(p, load_some(p, count) + g * N::normalised(v, numbers), count);
        }
        if constexpr (kSums == 2) {
          S* const p = share + features + i;
          store_some(p, load_some(p, count) + g, count);
        }
      };
      sums = sums_over<T, kUnrolled>(features, add);
    });
    if (!args.grad_x) continue;

    const NormProjection<S> projection = N::projection(sums, numbers, features);
    T* const grad_x = static_cast<T*>(args.grad_x) + row * features;
    with_flag(has_grad_total, [&](auto flag) EFFKERN_LAMBDA {
      constexpr bool kGradTotal = decltype(flag)::kCount != 0;
      const T* grad_total = nullptr;
      if constexpr (kGradTotal) {
        grad_total = static_cast<const T*>(args.grad_total) + row_offset(args.grad_total_rows, row);
      }
      for_each_vector<T, kUnrolled>(features, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
        const Vec<T> g = weighted(load_some(grad + i, count), weight, i, count);
        Vec<T> out = N::grad_x(g, normalised_at(i, count), numbers, projection);
        if constexpr (kGradTotal) out += load_some(grad_total + i, count);
        put(grad_x + i, out, count, streamed);
      });
    });
  }
  if (streamed) finish_streams();
}

template <class N, class T, class W>
void backward_chunks(const NormBackward& args, int64_t chunk_rows, void* partial, int64_t begin,
                     int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Acc<T>* share = nullptr;
    if (const int64_t numbers = args.sums() * args.features; numbers > 0) {
      share = static_cast<Acc<T>*>(partial) + chunk * numbers;
      __builtin_memset(share, 0, static_cast<size_t>(numbers) * sizeof(Acc<T>));
    }
    const int64_t first = chunk * chunk_rows;
    const int64_t last = first + chunk_rows < args.rows ? first + chunk_rows : args.rows;
    const bool has_grad_total = args.grad_total != nullptr;
    if (args.x_is_y) {
      // Its divisions take longer than anything that is decided for each row.
      backward_rows<N, T, W, true>(args, args.sums(), has_grad_total, share, first, last);
    } else {
      with_sums<W>(args.sums(), [&](auto sums) {
        with_flag(has_grad_total, [&](auto flag) {
          backward_rows<N, T, W, false>(args, sums, flag, share, first, last);
        });
      });
    }
  }
}

// One of the sums of `partial`, from its place `offset` in each chunk's share on.
template <class S, class W>
void reduce(void* result, int64_t offset, int64_t share, int64_t chunks, const void* partial,
            int64_t begin, int64_t end) {
  W* const out = static_cast<W*>(result);
  for (int64_t i = begin; i < end; i += kLanes<S>) {
    const int64_t count = end - i < kLanes<S> ? end - i : kLanes<S>;
    Vec<S> sum = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += load_some(static_cast<const S*>(partial) + chunk * share + offset + i, count);
    }
    store_some(out + i, sum, count);
  }
}

// Calls body with a value of an input's storage type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

// And with one of its weight's.
template <class Body>
void with_types(DType dtype, bool has_weight, DType weight_dtype, const Body& body) {
  with_type(dtype, [&](auto input) {
    if (!has_weight) return body(input, NoWeight{});
    if (weight_dtype == dtype) return body(input, input);
    return body(input, Acc<decltype(input)>{});
  });
}

template <class N>
void forward(const NormForward& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto input) {
    using T = decltype(input);
    args.residual ? forward_rows<N, T, true>(args, begin, end)
                  : forward_rows<N, T, false>(args, begin, end);
  });
}

template <class N>
void backward(const NormBackward& args, int64_t chunk_rows, void* partial, int64_t begin,
              int64_t end) {
  with_types(args.dtype, args.weight != nullptr, args.weight_dtype, [&](auto input, auto weight) {
    backward_chunks<N, decltype(input), decltype(weight)>(args, chunk_rows, partial, begin, end);
  });
}

template <class N>
void sum_shares(const NormBackward& args, int64_t chunks, const void* partial, int64_t begin,
                int64_t end) {
  with_types(args.dtype, true, args.weight_dtype, [&](auto input, auto weight) {
    using S = Acc<decltype(input)>;
    using W = decltype(weight);
    const int64_t share = args.sums() * args.features;
    if constexpr (!__is_same(W, NoWeight)) {
      if (args.grad_weight) reduce<S, W>(args.grad_weight, 0, share, chunks, partial, begin, end);
      if (args.grad_bias) {
        reduce<S, W>(args.grad_bias, args.features, share, chunks, partial, begin, end);
      }
    }
  });
}

template <class N>
NormKernels norm_kernels() {
  return {forward<N>, backward<N>, sum_shares<N>};
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
