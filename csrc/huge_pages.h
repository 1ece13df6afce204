// Huge pages for large memory.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace livrec {

// Asks for huge pages, before the memory is written for the first time: it is then mapped in a few
// steps instead of one per 4 KB, which for an op that only moves bytes is most of its time; and
// where rows are read at random, the processor finds their addresses sooner.
inline void ask_for_huge_pages(const void* data, uint64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge,
                  last = (begin + bytes) / kHuge * kHuge;
  if (bytes >= 2 * kHuge && first < last)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: may fail
#endif
}

}  // namespace livrec
