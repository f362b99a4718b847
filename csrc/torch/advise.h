// Large outputs on large pages.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace effkern {

// Asks the kernel to back freshly allocated memory with huge pages where it can. A large output is
// new memory at each call, and without this much of its cost is one page fault for every 4 KiB.
// Only whole huge pages inside the range are named; the advice may be ignored, and changes no
// content.
inline void advise_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes < static_cast<int64_t>(2 * kHugePage)) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace effkern
