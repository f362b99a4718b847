// Products of small matrices that stay in the nearest caches. cpu/kernels/isa.h must come first.
#pragma once

#include <cstdint>

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Tiles of kTileRows rows and two vectors: eight accumulators hide the latency of a multiply-add.
constexpr int64_t kTileRows = 4;
template <class S>
constexpr int64_t kTileColumns = 2 * kLanes<S>;

// What is known to be zero, or not wanted, and is left out a tile at a time.
enum class Part {
  kAll,
  kUpperResult,  // c is wanted on and above its diagonal
  kLowerResult,  // c is wanted on and below its diagonal
  kUpperRight,   // b is zero below its diagonal
  kLowerLeft,    // a is zero above its diagonal
  kUpperLeft,    // a is zero below its diagonal
};

// A matrix whose element (m, k) stands at m * row + k * column.
template <class S>
struct Left {
  const S* at;
  int64_t row, column;
};

// c += a b. `rows` must be a multiple of kTileRows and `columns` of kTileColumns.
template <Part kPart, class S>
void multiply_add(int64_t rows, int64_t columns, int64_t depth, Left<S> a, const S* b,
                  int64_t b_stride, S* c, int64_t c_stride) {
  using V = Vec<S>;
  constexpr int64_t kWidth = kTileColumns<S>, kHalf = kLanes<S>;
  for (int64_t m = 0; m < rows; m += kTileRows) {
    for (int64_t n = 0; n < columns; n += kWidth) {
      if (kPart == Part::kUpperResult && n + kWidth <= m) continue;
      if (kPart == Part::kLowerResult && n >= m + kTileRows) continue;
      int64_t last = depth;
      if (kPart == Part::kUpperRight && n + kWidth < last) last = n + kWidth;
      if (kPart == Part::kLowerLeft && m + kTileRows < last) last = m + kTileRows;
      V sums[kTileRows][2];
      for (int64_t r = 0; r < kTileRows; ++r) {
        sums[r][0] = load(c + (m + r) * c_stride + n);
        sums[r][1] = load(c + (m + r) * c_stride + n + kHalf);
      }
      for (int64_t k = kPart == Part::kUpperLeft ? m : 0; k < last; ++k) {
        const V low = load(b + k * b_stride + n), high = load(b + k * b_stride + n + kHalf);
        for (int64_t r = 0; r < kTileRows; ++r) {
          const S factor = a.at[(m + r) * a.row + k * a.column];
          sums[r][0] += factor * low;
          sums[r][1] += factor * high;
        }
      }
      for (int64_t r = 0; r < kTileRows; ++r) {
        store(c + (m + r) * c_stride + n, sums[r][0]);
        store(c + (m + r) * c_stride + n + kHalf, sums[r][1]);
      }
    }
  }
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
