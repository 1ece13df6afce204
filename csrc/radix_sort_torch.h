// A parallel radix sort, for torch operators.
#pragma once

#include <new>

#include "torch_glue.h"

namespace livrec {

constexpr int64_t kMostSortChunks = 16, kSortChunk = 1 << 14;  // tasks of a pass, and items of one

// A word and what it belongs to, as they are moved about: in eight bytes where 32 bits hold words.
struct NarrowEntry {
  uint64_t both;
  NarrowEntry(uint64_t word, uint32_t place) : both(word << 32 | place) {}
  uint64_t word() const { return both >> 32; }
  uint32_t place() const { return static_cast<uint32_t>(both); }
};
struct WideEntry {
  uint64_t own_word;
  uint32_t own_place;
  WideEntry(uint64_t word, uint32_t place) : own_word(word), own_place(place) {}
  uint64_t word() const { return own_word; }
  uint32_t place() const { return own_place; }
};

template <typename Entry>
void sort_as(std::vector<uint64_t>& words, std::vector<uint32_t>& order, int64_t bits) {
  const int64_t count = static_cast<int64_t>(words.size());
  const int64_t chunks = std::clamp<int64_t>(count / kSortChunk, 1, kMostSortChunks);
  const int64_t chunk = (count + chunks - 1) / chunks;
  // Few items may have many digits: what is moved stays in the caches.
  const int64_t widest = count < 1 << 18 ? 12 : 8, passes = (bits + widest - 1) / widest;
  const int64_t width = (bits + passes - 1) / passes, digits = int64_t{1} << width;
  const Scratch room(2 * count * static_cast<int64_t>(sizeof(Entry)));
  auto* from = static_cast<Entry*>(room.data());
  Entry* to = from + count;
  std::vector<uint32_t> places(static_cast<size_t>(chunks * digits));
  const auto each_chunk = [&](const auto& visit) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        visit(places.data() + c * digits, c * chunk, std::min(count, (c + 1) * chunk));
    });
  };
  each_chunk([&](uint32_t*, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      new (from + i) Entry(words[static_cast<size_t>(i)], order[static_cast<size_t>(i)]);
  });
  for (int64_t shift = 0; shift < bits; shift += width) {
    const auto digit = [&](const Entry& entry) {
      return (entry.word() >> shift) & static_cast<uint64_t>(digits - 1);
    };
    each_chunk([&](uint32_t* counts, int64_t begin, int64_t end) {
      std::fill_n(counts, digits, 0u);
      for (int64_t i = begin; i < end; ++i) ++counts[digit(from[i])];
    });
    uint32_t place = 0;
    for (int64_t d = 0; d < digits; ++d)
      for (int64_t c = 0; c < chunks; ++c) {
        const uint32_t size = places[static_cast<size_t>(c * digits + d)];
        places[static_cast<size_t>(c * digits + d)] = place;
        place += size;
      }
    each_chunk([&](uint32_t* next, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[next[digit(from[i])]++] = from[i];
    });
    std::swap(from, to);
  }
  each_chunk([&](uint32_t*, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      words[static_cast<size_t>(i)] = from[i].word();
      order[static_cast<size_t>(i)] = from[i].place();
    }
  });
}

// Orders words of `bits` bits and what belongs to each, equal ones as they were: a radix sort.
inline void sort(std::vector<uint64_t>& words, std::vector<uint32_t>& order, int64_t bits) {
  if (words.size() < 2 || bits == 0) return;
  if (bits <= 32) return sort_as<NarrowEntry>(words, order, bits);
  sort_as<WideEntry>(words, order, bits);
}

}  // namespace livrec
