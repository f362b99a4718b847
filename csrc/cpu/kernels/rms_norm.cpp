// RMSNorm, a row at a time: the first pass over a row brings it into the nearest cache and the
// second finds it there, so each byte of memory is read once and written once.
#include "math/rms_norm.h"

#include "cpu/kernels/isa.h"

#define EFFKERN_LAMBDA __attribute__((always_inline))

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Outputs beyond this many bytes are written past the caches: they would not stay there until their
// reader comes.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Calls body(i, count, slot) for each vector of a row; count is less than a vector only for the
// last. Consecutive vectors have different slots of kSlots, so that a sum kept per slot does not
// wait for the addition before.
constexpr int kSlots = 4;
template <class T, class Body>
EFFKERN_INLINE void for_each_vector(int64_t features, const Body& body) {
  constexpr int64_t kStep = kLanes<T>;
  int64_t i = 0;
  for (; i + kSlots * kStep <= features; i += kSlots * kStep) {
    body(i, kStep, 0);
    body(i + kStep, kStep, 1);
    body(i + 2 * kStep, kStep, 2);
    body(i + 3 * kStep, kStep, 3);
  }
  for (; i + kStep <= features; i += kStep) body(i, kStep, 0);
  if (i < features) body(i, features - i, 1);
}

template <class V>
EFFKERN_INLINE auto sum_slots(const V (&slots)[kSlots]) {
  return sum_lanes((slots[0] + slots[1]) + (slots[2] + slots[3]));
}

// Whether an output of contiguous rows is to be written past the caches. All vectors are then whole
// and aligned.
template <class T>
bool is_streamed(const void* output, int64_t rows, int64_t features) {
  const int64_t row_bytes = features * static_cast<int64_t>(sizeof(T));
  return rows * row_bytes >= kStreamBytes && row_bytes % EFFKERN_VECTOR_BYTES == 0 &&
         reinterpret_cast<uintptr_t>(output) % EFFKERN_VECTOR_BYTES == 0;
}

template <class T>
EFFKERN_INLINE void put(T* p, Vec<T> v, int64_t count, bool streamed) {
  if (streamed) {
    stream(p, v);
  } else {
    store_some(p, v, count);
  }
}

// The storage type of a weight that is not there.
struct NoWeight {};

template <class W, class V>
EFFKERN_INLINE V weighted(V v, const W* weight, int64_t i, int64_t count) {
  if constexpr (__is_same(W, NoWeight)) {
    return v;
  } else {
    return v * load_some(weight + i, count);
  }
}

template <class T, class W, bool kResidual>
void forward(const RmsNormForward& args, int64_t begin, int64_t end) {
  using S = Acc<T>;
  const int64_t features = args.features;
  const W* const weight = static_cast<const W*>(args.weight);
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

    Vec<T> squares[kSlots] = {};
    for_each_vector<T>(features, [&](int64_t i, int64_t count, int slot) EFFKERN_LAMBDA {
      const Vec<T> v = total_at(i, count);
      squares[slot] += v * v;
    });
    const S rstd = rms_norm_rstd(sum_slots(squares), features, static_cast<S>(args.eps));
    static_cast<S*>(args.rstd)[row] = rstd;

    T* const y = static_cast<T*>(args.y) + row * features;
    T* const total = static_cast<T*>(args.total) + (kResidual ? row * features : 0);
    for_each_vector<T>(features, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
      const Vec<T> v = total_at(i, count);
      if constexpr (kResidual) put(total + i, v, count, total_streamed);
      put(y + i, weighted(v * rstd, weight, i, count), count, y_streamed);
    });
  }
  if (y_streamed || total_streamed) finish_streams();
}

// `partial` takes the rows' share of the weight's gradient: one row of features, zero before the
// first.
template <class T, class W, bool kPartial, bool kGradTotal>
void backward_rows(const RmsNormBackward& args, Acc<T>* partial, int64_t begin, int64_t end) {
  using S = Acc<T>;
  const int64_t features = args.features;
  const W* const weight = static_cast<const W*>(args.weight);
  const bool streamed = args.grad_x && is_streamed<T>(args.grad_x, args.rows, features);

  for (int64_t row = begin; row < end; ++row) {
    const T* const grad = static_cast<const T*>(args.grad) + row_offset(args.grad_rows, row);
    const T* const x = static_cast<const T*>(args.x) + row_offset(args.x_rows, row);
    const S rstd = static_cast<const S*>(args.rstd)[row];

    Vec<T> products[kSlots] = {};
    for_each_vector<T>(features, [&](int64_t i, int64_t count, int slot) EFFKERN_LAMBDA {
      const Vec<T> g = load_some(grad + i, count), v = load_some(x + i, count);
      products[slot] += weighted(g, weight, i, count) * v;
      if constexpr (kPartial) {
        store_some(partial + i, load_some(partial + i, count) + rms_norm_grad_weight(g, v, rstd),
                   count);
      }
    });
    if (!args.grad_x) continue;

    const S projection = rms_norm_projection(sum_slots(products), rstd, features);
    T* const grad_x = static_cast<T*>(args.grad_x) + row * features;
    const T* grad_total = nullptr;
    if constexpr (kGradTotal) {
      grad_total = static_cast<const T*>(args.grad_total) + row_offset(args.grad_total_rows, row);
    }
    for_each_vector<T>(features, [&](int64_t i, int64_t count, int) EFFKERN_LAMBDA {
      const Vec<T> g = weighted(load_some(grad + i, count), weight, i, count);
      Vec<T> out = rms_norm_grad_x(g, load_some(x + i, count), rstd, projection);
      if constexpr (kGradTotal) out += load_some(grad_total + i, count);
      put(grad_x + i, out, count, streamed);
    });
  }
  if (streamed) finish_streams();
}

template <class T, class W>
void forward(const RmsNormForward& args, int64_t begin, int64_t end) {
  return args.residual ? forward<T, W, true>(args, begin, end)
                       : forward<T, W, false>(args, begin, end);
}

template <class T, class W, bool kPartial, bool kGradTotal>
void backward_chunks(const RmsNormBackward& args, int64_t chunk_rows, void* partial, int64_t begin,
                     int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Acc<T>* share = nullptr;
    if constexpr (kPartial) {
      share = static_cast<Acc<T>*>(partial) + chunk * args.features;
      __builtin_memset(share, 0, static_cast<size_t>(args.features) * sizeof(Acc<T>));
    }
    const int64_t first = chunk * chunk_rows;
    const int64_t last = first + chunk_rows < args.rows ? first + chunk_rows : args.rows;
    backward_rows<T, W, kPartial, kGradTotal>(args, share, first, last);
  }
}

template <class T, class W, bool kPartial>
void backward(const RmsNormBackward& args, int64_t chunk_rows, void* partial, int64_t begin,
              int64_t end) {
  return args.grad_total
             ? backward_chunks<T, W, kPartial, true>(args, chunk_rows, partial, begin, end)
             : backward_chunks<T, W, kPartial, false>(args, chunk_rows, partial, begin, end);
}

template <class S, class W>
void reduce_weight(const RmsNormBackward& args, int64_t chunks, const void* partial, int64_t begin,
                   int64_t end) {
  W* const out = static_cast<W*>(args.grad_weight);
  for (int64_t i = begin; i < end; i += kLanes<S>) {
    const int64_t count = end - i < kLanes<S> ? end - i : kLanes<S>;
    Vec<S> sum = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += load_some(static_cast<const S*>(partial) + chunk * args.features + i, count);
    }
    store_some(out + i, sum, count);
  }
}

// Calls body with values of the storage types of an input and of its weight.
template <class Body>
void with_types(DType dtype, bool has_weight, DType weight_dtype, const Body& body) {
  const auto with_input = [&](auto input) {
    using T = decltype(input);
    if (!has_weight) return body(input, NoWeight{});
    if (weight_dtype == dtype) return body(input, T{});
    return body(input, Acc<T>{});
  };
  switch (dtype) {
    case DType::kFloat32:
      return with_input(float{});
    case DType::kFloat64:
      return with_input(double{});
    case DType::kBFloat16:
      return with_input(BFloat16{});
    case DType::kFloat16:
      return with_input(Float16{});
  }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& args, int64_t begin, int64_t end) {
  with_types(args.dtype, args.weight != nullptr, args.weight_dtype, [&](auto input, auto weight) {
    forward<decltype(input), decltype(weight)>(args, begin, end);
  });
}

void rms_norm_backward(const RmsNormBackward& args, int64_t chunk_rows, void* partial,
                       int64_t begin, int64_t end) {
  with_types(args.dtype, args.weight != nullptr, args.weight_dtype, [&](auto input, auto weight) {
    using T = decltype(input);
    using W = decltype(weight);
    if constexpr (!__is_same(W, NoWeight)) {
      if (partial) return backward<T, W, true>(args, chunk_rows, partial, begin, end);
    }
    backward<T, W, false>(args, chunk_rows, nullptr, begin, end);
  });
}

void rms_norm_weight(const RmsNormBackward& args, int64_t chunks, const void* partial,
                     int64_t begin, int64_t end) {
  with_types(args.dtype, true, args.weight_dtype, [&](auto input, auto weight) {
    using W = decltype(weight);
    if constexpr (!__is_same(W, NoWeight)) {
      reduce_weight<Acc<decltype(input)>, W>(args, chunks, partial, begin, end);
    }
  });
}

}  // namespace effkern::cpu::EFFKERN_ISA
