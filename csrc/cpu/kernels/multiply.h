// Products of small matrices that stay in the nearest caches. cpu/kernels/isa.h must come first.
#pragma once

#include <cstdint>
#include <utility>

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Tiles of kTileRows rows and two vectors: eight accumulators hide the latency of a multiply-add,
// and little of a triangle's other half is computed.
constexpr int64_t kTileRows = 4;
template <class S>
constexpr int64_t kTileColumns = 2 * kLanes<S>;

// What is known to be zero, or not wanted, and is left out a tile at a time. (kUpperLeft only onto
// a sum: a tile of nothing but zeros is left as it was.)
enum class Part {
  kAll,
  kUpperResult,  // c is wanted on and above its diagonal
  kLowerResult,  // c is wanted on and below its diagonal
  kUpperRight,   // b is zero below its diagonal
  kLowerLeft,    // a is zero above its diagonal
  kUpperLeft,    // a is zero below its diagonal
};

// What becomes of what stands in the result.
enum class Onto {
  kNothing,  // it is overwritten: it need not be cleared, and what is not wanted keeps what it held
  kSum,      // it is added to
};

// A matrix whose element (m, k) stands at m * row + k * column.
template <class S>
struct Left {
  const S* at;
  int64_t row, column;
};

// A tile of c, kRows by kTileColumns, from the `depth` columns of a and rows of b that begin where
// these point; at least one.
template <int64_t kRows, Onto kOnto, class S>
EFFKERN_INLINE void multiply_tile(int64_t depth, Left<S> a, const S* b, int64_t b_stride, S* c,
                                  int64_t c_stride, S scale = 1) {
  Vec<S> sums[kRows][2];
  // The first products begin the sums: zeros would be written to memory, for a loop of none.
  Vec<S> low = load(b), high = load(b + kLanes<S>);
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
    const S factor = a.at[r * a.row];
    sums[r][0] = factor * low;
    sums[r][1] = factor * high;
  }
  for (int64_t k = 1; k < depth; ++k) {
    a.at += a.column, b += b_stride;
    low = load(b), high = load(b + kLanes<S>);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const S factor = a.at[r * a.row];
      sums[r][0] += factor * low;
      sums[r][1] += factor * high;
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      S* const to = c + r * c_stride + half * kLanes<S>;
      const Vec<S> scaled = sums[r][half] * scale;
      store(to, kOnto == Onto::kSum ? load(to) + scaled : scaled);
    }
  }
}

template <class S>
EFFKERN_INLINE void clear_tile(S* c, int64_t c_stride) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t half = 0; half < 2; ++half) store(c + r * c_stride + half * kLanes<S>, Vec<S>{});
  }
}

// c = a b, or c += a b. `rows` must be a multiple of kTileRows and `columns` of kTileColumns.
template <Part kPart, Onto kOnto, class S>
void multiply(int64_t rows, int64_t columns, int64_t depth, Left<S> a, const S* b, int64_t b_stride,
              S* c, int64_t c_stride) {
  constexpr int64_t kWidth = kTileColumns<S>;
  for (int64_t m = 0; m < rows; m += kTileRows) {
    const int64_t first = kPart == Part::kUpperLeft ? m : 0;
    for (int64_t n = 0; n < columns; n += kWidth) {
      if (kPart == Part::kUpperResult && n + kWidth <= m) continue;
      if (kPart == Part::kLowerResult && n >= m + kTileRows) break;
      int64_t last = depth;
      if (kPart == Part::kUpperRight && n + kWidth < last) last = n + kWidth;
      if (kPart == Part::kLowerLeft && m + kTileRows < last) last = m + kTileRows;
      if (first >= last) {  // of no depth, or of zeros alone
        if (kOnto == Onto::kNothing) clear_tile(c + m * c_stride + n, c_stride);
        continue;
      }
      multiply_tile<kTileRows, kOnto>(
          last - first, {a.at + m * a.row + first * a.column, a.row, a.column},
          b + first * b_stride + n, b_stride, c + m * c_stride + n, c_stride);
    }
  }
}

// ---- products of which one matrix is too large for the nearest cache ----

// Twelve accumulators: as many as 16 registers allow.
constexpr int64_t kTallRows = 6;

// A matrix whose element (k, n) stands at n / kTileColumns * panel + k * row + n % kTileColumns.
template <class S>
struct Panels {
  const S* at;
  int64_t row, panel;
};

// What stays in the nearest cache: a stretch of a panel, or a few rows of a.
enum class Stays { kPanel, kRows };

// A function of its own: it needs all registers for itself.
template <Onto kOnto, class S>
EFFKERN_OUTLINE void multiply_tall_tile(int64_t depth, Left<S> a, const S* b, int64_t b_stride,
                                        S* c, int64_t c_stride, S scale) {
  multiply_tile<kTallRows, kOnto>(depth, a, b, b_stride, c, c_stride, scale);
}

// c = scale a b, or c += scale a b. `rows` must be a multiple of kTallRows and `columns` of
// kTileColumns.
template <Stays kStays, Onto kOnto, class S>
void multiply_panels(int64_t rows, int64_t columns, int64_t depth, Left<S> a, Panels<S> b, S* c,
                     int64_t c_stride, S scale) {
  constexpr int64_t kWidth = kTileColumns<S>, kDepth = 256;
  if (kOnto == Onto::kNothing && depth == 0) {  // values of no features
    for (int64_t m = 0; m < rows; ++m) {
      __builtin_memset(c + m * c_stride, 0, static_cast<size_t>(columns) * sizeof(S));
    }
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t some = depth - k < kDepth ? depth - k : kDepth;
    const auto tile = [&](int64_t m, int64_t n) EFFKERN_LAMBDA {
      const auto multiply_tile = kOnto == Onto::kSum || k > 0
                                     ? &multiply_tall_tile<Onto::kSum, S>
                                     : &multiply_tall_tile<Onto::kNothing, S>;
      multiply_tile(some, {a.at + m * a.row + k * a.column, a.row, a.column},
                    b.at + n / kWidth * b.panel + k * b.row, b.row, c + m * c_stride + n, c_stride,
                    scale);
    };
    if constexpr (kStays == Stays::kPanel) {
      for (int64_t n = 0; n < columns; n += kWidth) {
        for (int64_t m = 0; m < rows; m += kTallRows) tile(m, n);
      }
    } else {
      for (int64_t m = 0; m < rows; m += kTallRows) {
        for (int64_t n = 0; n < columns; n += kWidth) tile(m, n);
      }
    }
  }
}

// ---- transposition ----

// The lanes kFrom of two vectors, those of b counted behind those of a.
template <int... kFrom, class V>
EFFKERN_INLINE V lanes_of(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kFrom...);
#else  // GCC before 12
  return __builtin_shuffle(a, b, decltype(a > b){kFrom...});
#endif
}

// The lanes of both in turn: the first half of each, and the second.
template <class V, int... kLane>
EFFKERN_INLINE void interleave(V a, V b, V& first, V& second,
                               std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  first = lanes_of<(kLane % 2 * kCount + kLane / 2)...>(a, b);
  second = lanes_of<(kLane % 2 * kCount + kLane / 2 + kCount / 2)...>(a, b);
}

// A square of as many rows as a vector has lanes. `from` may be `to`.
template <class S>
EFFKERN_INLINE void transpose_square(const S* from, int64_t from_stride, S* to, int64_t to_stride) {
  constexpr int kCount = kLanes<S>;
  Vec<S> rows[kCount], mixed[kCount];
  for (int i = 0; i < kCount; ++i) rows[i] = load(from + i * from_stride);
  for (int step = 1; step < kCount; step *= 2) {
    for (int i = 0; i < kCount / 2; ++i) {
      interleave(rows[i], rows[i + kCount / 2], mixed[2 * i], mixed[2 * i + 1],
                 std::make_integer_sequence<int, kCount>());
    }
    for (int i = 0; i < kCount; ++i) rows[i] = mixed[i];
  }
  for (int i = 0; i < kCount; ++i) store(to + i * to_stride, rows[i]);
}

// `rows` and `columns` must be multiples of a vector's lanes.
template <class S>
void transpose(const S* from, int64_t rows, int64_t columns, int64_t stride, S* to,
               int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes<S>) {
    for (int64_t c = 0; c < columns; c += kLanes<S>) {
      transpose_square(from + r * stride + c, stride, to + c * to_stride + r, to_stride);
    }
  }
}

// Makes a matrix whose part on and above the diagonal is given symmetric.
template <class S>
void make_symmetric(S* matrix, int64_t size, int64_t stride) {
  for (int64_t r = 0; r < size; r += kLanes<S>) {
    for (int64_t i = r; i < r + kLanes<S>; ++i) {
      for (int64_t j = r; j < i; ++j) matrix[i * stride + j] = matrix[j * stride + i];
    }
    for (int64_t c = r + kLanes<S>; c < size; c += kLanes<S>) {
      transpose_square(matrix + r * stride + c, stride, matrix + c * stride + r, stride);
    }
  }
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
