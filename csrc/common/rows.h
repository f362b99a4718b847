// A tensor seen as rows of contiguous features, where the rows themselves may be strided.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace effkern {

// Any tensor whose leading dimensions collapse to at most three strided ones. Strides are in
// elements.
struct RowLayout {
  int64_t size1, size2;               // extents of the middle and the innermost leading dimension
  int64_t stride0, stride1, stride2;  // strides of the three leading dimensions
};

EFFKERN_INLINE int64_t row_offset(const RowLayout& layout, int64_t row) {
  if (layout.size1 == 1 && layout.size2 == 1) return row * layout.stride0;
  const int64_t inner = row % layout.size2;
  const int64_t rest = row / layout.size2;
  return rest / layout.size1 * layout.stride0 + rest % layout.size1 * layout.stride1 +
         inner * layout.stride2;
}

}  // namespace effkern
