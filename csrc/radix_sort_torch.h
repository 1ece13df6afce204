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

// Puts what `read` gives for 0, 1, ... into the order of a digit of its words, by `write`.
class SortPass {
 public:
  SortPass(int64_t count, int64_t width)
      : count_(count),
        digits_(int64_t{1} << width),
        chunks_(std::clamp<int64_t>(
            count / kSortChunk, 1,
            std::min<int64_t>(torch::stable::get_num_threads(), kMostSortChunks))),
        places_(static_cast<size_t>(chunks_ * digits_)) {}

  template <typename Read, typename Write>
  void go(int64_t shift, const Read& read, const Write& write) {
    const auto digit = [&](const auto& entry) {
      return (entry.word() >> shift) & static_cast<uint64_t>(digits_ - 1);
    };
    each_chunk([&](uint32_t* counts, int64_t begin, int64_t end) {
      std::fill_n(counts, digits_, 0u);
      for (int64_t i = begin; i < end; ++i) ++counts[digit(read(i))];
    });
    uint32_t place = 0;
    for (int64_t d = 0; d < digits_; ++d)
      for (int64_t c = 0; c < chunks_; ++c) {
        const uint32_t size = places_[static_cast<size_t>(c * digits_ + d)];
        places_[static_cast<size_t>(c * digits_ + d)] = place;
        place += size;
      }
    each_chunk([&](uint32_t* next, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto entry = read(i);
        write(next[digit(entry)]++, entry);
      }
    });
  }

 private:
  template <typename Visit>
  void each_chunk(const Visit& visit) {
    const int64_t chunk = (count_ + chunks_ - 1) / chunks_;
    torch::stable::parallel_for(0, chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        visit(places_.data() + c * digits_, c * chunk, std::min(count_, (c + 1) * chunk));
    });
  }

  int64_t count_, digits_, chunks_;
  std::vector<uint32_t> places_;
};

template <typename Entry>
void sort_as(uint64_t* words, uint32_t* order, int64_t count, int64_t bits, bool numbered) {
  // Few items may have many digits: what is moved stays in the caches. Two passes at least, as the
  // first one reads words and the last one writes them.
  const int64_t widest = count < 1 << 18 ? 12 : 8;
  const int64_t passes = std::max<int64_t>(2, (bits + widest - 1) / widest);
  const int64_t width = (bits + passes - 1) / passes;
  const Scratch room(2 * count * static_cast<int64_t>(sizeof(Entry)));
  auto* from = static_cast<Entry*>(room.data());
  Entry* to = from + count;
  const auto given = [&](int64_t i) {
    return Entry(words[i], numbered ? order[i] : static_cast<uint32_t>(i));
  };
  const auto moved = [&](int64_t i) { return from[i]; };
  const auto move = [&](uint32_t place, const Entry& entry) { new (to + place) Entry(entry); };
  const auto finish = [&](uint32_t place, const Entry& entry) {
    words[place] = entry.word(), order[place] = entry.place();
  };
  SortPass pass(count, width);
  pass.go(0, given, move);
  for (int64_t p = 1; p + 1 < passes; ++p) {
    std::swap(from, to);
    pass.go(p * width, moved, move);
  }
  std::swap(from, to);
  pass.go((passes - 1) * width, moved, finish);
}

// Orders words of `bits` bits and what belongs to each, equal ones as they were: a radix sort.
// numbered: what belongs to them is in `order`; else it is 0, 1, ...
inline void sort(uint64_t* words, uint32_t* order, int64_t count, int64_t bits, bool numbered) {
  if (bits <= 32) return sort_as<NarrowEntry>(words, order, count, bits, numbered);
  sort_as<WideEntry>(words, order, count, bits, numbered);
}

}  // namespace livrec
