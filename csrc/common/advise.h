// Large outputs on large pages.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace effkern {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Asks the kernel to back freshly allocated memory with huge pages where it can. A large output is
// new memory at each call, and without this much of its cost is one page fault for every 4 KiB.
// Only whole huge pages inside the range are named; the advice may be ignored, and changes no
// content. (Static: kernels of several instruction sets have it.)
[[maybe_unused]] static inline void advise_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePage) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  constexpr uintptr_t kPage = kHugePage;
  const uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace effkern
