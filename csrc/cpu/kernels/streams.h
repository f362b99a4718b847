// Loops over arrays that are longer than the caches. cpu/kernels/isa.h must come first.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

// The hardware follows a stream only to the end of a page, and begins anew in the next. What is
// asked for this many bytes before it is needed comes in time: with the four streams of an Adam
// step a fifth faster on a Xeon than without, and on Zen 3 not slower (docs/measured.md).
constexpr int64_t kBytesAhead = 1024;
template <class T>
constexpr int64_t kAhead = kBytesAhead / static_cast<int64_t>(sizeof(T));

// The elements of a cache line.
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

// Calls body(i) for each whole vector of the elements [begin, end), and near(i) before each line of
// them. The first element that is left.
template <class T, class Near, class Body>
EFFKERN_INLINE int64_t over_lines(int64_t begin, int64_t end, const Near& near, const Body& body) {
  static_assert(kLine<T> % kLanes<T> == 0);
  int64_t i = begin;
  for (; i + kLine<T> <= end; i += kLine<T>) {
    near(i);
    for (int64_t j = i; j < i + kLine<T>; j += kLanes<T>) body(j);
  }
  for (; i + kLanes<T> <= end; i += kLanes<T>) body(i);
  return i;
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
