// How a kernel goes over rows of numbers, a vector at a time. cpu/kernels/isa.h must come first.
#pragma once

#include "cpu/kernels.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// Outputs beyond this many bytes are written past the caches: they would not stay there until their
// reader comes.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Calls body(i, count, slot) for each vector of a row; count is less than a vector only for the
// last. kUnrolled consecutive vectors have different slots, so that a sum kept per slot does not
// wait for the addition before. Each of them is a copy of the body, of which a kernel has many
// instances: the vectors after the last kUnrolled ones share one.
constexpr int kSlots = 4;
template <class T, int kUnrolled = kSlots, class Body>
EFFKERN_INLINE void for_each_vector(int64_t features, const Body& body) {
  static_assert(kUnrolled == 1 || kUnrolled == kSlots);
  constexpr int64_t kStep = kLanes<T>;
  int64_t i = 0;
  for (; i + kUnrolled * kStep <= features; i += kUnrolled * kStep) {
    body(i, kStep, 0);
    if constexpr (kUnrolled == kSlots) {
      body(i + kStep, kStep, 1);
      body(i + 2 * kStep, kStep, 2);
      body(i + 3 * kStep, kStep, 3);
    }
  }
  for (; i < features; i += kStep) body(i, features - i < kStep ? features - i : kStep, 0);
}

// Whether an output of contiguous rows is to be written past the caches. All vectors are then whole
// and aligned. No 16-bit ones are.
template <class T>
EFFKERN_INLINE bool is_streamed(const void* output, int64_t rows, int64_t features) {
  if constexpr (sizeof(T) < 4) return false;
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

// What add(sums, i, count) gathers from the vectors of a row, each into some copy of `none`; two of
// them become one by merge(a, b). They are taken of a block at a time: beside one value far larger
// than the others, or after very many, a sum that goes on has no digits left for more.
template <class T, int kUnrolled = kSlots, class Sums, class Merge, class Add>
EFFKERN_INLINE Sums over_row(int64_t features, const Sums& none, const Merge& merge,
                             const Add& add) {
  constexpr int64_t kBlock = 1024;
  Sums all = none;
  for (int64_t block = 0; block < features; block += kBlock) {
    Sums slots[kSlots] = {none, none, none, none};
    const int64_t left = features - block;
    for_each_vector<T, kUnrolled>(left < kBlock ? left : kBlock,
                                  [&](int64_t i, int64_t count, int slot)
                                      EFFKERN_LAMBDA { add(slots[slot], block + i, count); });
    all = merge(all, merge(merge(slots[0], slots[1]), merge(slots[2], slots[3])));
  }
  return all;
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
