// Memory for a kernel's own use, and rows of any type brought there and multiplied.
// cpu/kernels/isa.h must come first.
#pragma once

#include <cstdlib>

#include "common/advise.h"
#include "cpu/kernels.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

constexpr int64_t whole(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Numbers for one thread's use, handed out from one allocation of room for so many doubles; of
// large pages where it is large.
class Memory {
 public:
  explicit Memory(int64_t doubles) {
    const int64_t bytes = doubles * static_cast<int64_t>(sizeof(double));
    const int64_t alignment = bytes < 2 * kHugePage ? kCacheLine : kHugePage;
    block_ = static_cast<char*>(::aligned_alloc(static_cast<size_t>(alignment),
                                                static_cast<size_t>(whole(bytes, alignment))));
    if (!block_) ::abort();
    next_ = block_, end_ = block_ + whole(bytes, alignment);
    advise_huge_pages(block_, bytes);
  }
  ~Memory() { ::free(block_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <class S>
  S* take(int64_t count) {
    S* const mine = reinterpret_cast<S*>(next_);
    next_ += whole(count * static_cast<int64_t>(sizeof(S)), kCacheLine);
    if (next_ > end_) ::abort();
    return mine;
  }

 private:
  static constexpr int64_t kCacheLine = 64;
  char *block_, *next_, *end_;
};

template <class S>
void clear(S* p, int64_t count) {
  __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(S));
}

// Row by row, filled up with zeros to `stride`.
template <class T>
EFFKERN_INLINE void load_row(const T* from, int64_t features, int64_t stride, Acc<T>* to) {
  int64_t i = 0;
  for (; i < features; i += kLanes<T>) {
    store(to + i, load_some(from + i, least(features - i, kLanes<T>)));
  }
  for (; i < stride; i += kLanes<T>) store(to + i, Vec<T>{});
}

template <class T>
EFFKERN_INLINE void store_row(T* to, const Acc<T>* from, int64_t features) {
  for (int64_t i = 0; i < features; i += kLanes<T>) {
    store_some(to + i, load(from + i), least(features - i, kLanes<T>));
  }
}

// The sum of products, in an order that depends on the length alone.
template <class S>
EFFKERN_INLINE S dot(const S* a, const S* b, int64_t stride) {
  Vec<S> sums[2] = {};
  for (int64_t i = 0; i < stride; i += 2 * kLanes<S>) {
    sums[0] += load(a + i) * load(b + i);
    sums[1] += load(a + i + kLanes<S>) * load(b + i + kLanes<S>);
  }
  return sum_lanes(sums[0] + sums[1]);
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
