// Which rows of each field's table a history names, each of them once: see code_fields.h.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "code_fields.h"
#include "prefix_torch.h"

namespace livrec {

// Finds the rows of one history after the other; memory stays for the next.
class HistoryRows {
 public:
  // Items [begin, end). Codes out of range are noted and count as unknown.
  void read(const Codes& codes, int64_t begin, int64_t end, FirstBad& first_bad) {
    items_ = end - begin, fields_ = codes.level_count, slot_count_ = 0;
    slots_.resize(static_cast<size_t>(items_ * fields_));
    distinct_.clear();
    ends_.assign(1, 0);
    bool all_found = false;
    for (int64_t f = 0; f < fields_; ++f) {
      if (is_direct(codes, f)) {
        read_direct(codes, f, begin, first_bad);
      } else {
        if (!all_found) find_rows(codes, begin, first_bad), all_found = true;
        read_found(codes.levels[f], f);
      }
      ends_.push_back(static_cast<int64_t>(distinct_.size()));
    }
  }

  CodeRows rows() const {
    return {items_, fields_, slots_.data(), distinct_.data(), ends_.data(), slot_count_};
  }
  int64_t distinct() const { return static_cast<int64_t>(distinct_.size()); }

 private:
  // Rows few enough to count in an array.
  bool is_small(uint64_t rows) const { return rows < static_cast<uint64_t>(8 * items_ + 4096); }

  // Whether a field's codes are its rows, as they lie.
  bool is_direct(const Codes& codes, int64_t f) const {
    const bool alone = codes.levels[f].begins && (f + 1 == fields_ || codes.levels[f + 1].begins);
    return alone && codes.type != CodeType::packed && codes.levels[f].hash == KeyHash::none &&
           is_small(codes.levels[f].rows);
  }

  void read_direct(const Codes& codes, int64_t f, int64_t begin, FirstBad& first_bad) {
    switch (codes.type) {
      case CodeType::u8:
        return read_column<uint8_t>(codes, f, begin, first_bad);
      case CodeType::i8:
        return read_column<int8_t>(codes, f, begin, first_bad);
      case CodeType::i16:
        return read_column<int16_t>(codes, f, begin, first_bad);
      case CodeType::i32:
        return read_column<int32_t>(codes, f, begin, first_bad);
      default:
        return read_column<int64_t>(codes, f, begin, first_bad);
    }
  }

  template <typename Code>
  void read_column(const Codes& codes, int64_t f, int64_t begin, FirstBad& first_bad) {
    const auto* from =
        static_cast<const Code*>(codes.data) + begin * codes.row_stride + f * codes.column_stride;
    const int64_t size = codes.levels[f].size, stride = codes.row_stride;
    int64_t bad = -1;
    for (int64_t i = 0; i < items_; ++i) {
      const int64_t code = static_cast<int64_t>(from[i * stride]);
      if ((code < -1 || code >= size) && bad < 0) bad = begin + i;
    }
    first_bad.note(bad);
    if (bad >= 0) return number(f, 1, [](int64_t) { return 0; });
    number(f, size + 1, [&](int64_t i) { return static_cast<int64_t>(from[i * stride]) + 1; });
  }

  void find_rows(const Codes& codes, int64_t begin, FirstBad& first_bad) {
    found_.resize(static_cast<size_t>(items_ * fields_));
    std::vector<int64_t> block(static_cast<size_t>(fields_ * kPrefixBlock));
    for (int64_t at = 0; at < items_; at += kPrefixBlock) {
      const int64_t some = std::min(kPrefixBlock, items_ - at);
      first_bad.note(
          LIVREC_CALL(prefix_ngram_rows, codes, begin + at, begin + at + some, block.data()));
      for (int64_t f = 0; f < fields_; ++f)
        std::copy_n(block.data() + f * kPrefixBlock, some, found_.data() + f * items_ + at);
    }
  }

  void read_found(const PrefixLevel& level, int64_t f) {
    int64_t* rows = found_.data() + f * items_;
    if (is_small(level.rows))
      return number(f, static_cast<int64_t>(level.rows) + 1,
                    [&](int64_t i) { return rows[i] + 1; });
    // Too many rows for an array: theirs are numbered as they come, through a table of hashes.
    size_t places = 16;
    while (places < static_cast<size_t>(2 * items_)) places *= 2;
    table_.assign(places, {-2, 0});
    names_.clear();
    for (int64_t i = 0; i < items_; ++i) {
      size_t place = static_cast<size_t>(rows[i]) * 0x9e3779b97f4a7c15ull >> 20 & (places - 1);
      while (table_[place].first != rows[i] && table_[place].first != -2)
        place = (place + 1) & (places - 1);
      if (table_[place].first == -2) {
        table_[place] = {rows[i], static_cast<int64_t>(names_.size())};
        names_.push_back(rows[i]);
      }
      rows[i] = table_[place].second;
    }
    const size_t before = distinct_.size();
    number(f, static_cast<int64_t>(names_.size()), [&](int64_t i) { return rows[i]; });
    for (size_t i = before; i < distinct_.size(); ++i)
      distinct_[i].row = names_[static_cast<size_t>(distinct_[i].row + 1)];
  }

  // Gives each item its slot. number_of(i) is the row of item i, plus 1, below `limit`.
  template <typename NumberOf>
  void number(int64_t f, int64_t limit, const NumberOf& number_of) {
    counts_.assign(static_cast<size_t>(limit), 0);
    uint32_t* counts = counts_.data();
    for (int64_t i = 0; i < items_; ++i) ++counts[number_of(i)];
    distinct_.reserve(distinct_.size() + static_cast<size_t>(std::min(limit, items_)));
    first_.resize(static_cast<size_t>(limit));
    last_.resize(static_cast<size_t>(limit));
    bool turns = false;
    for (int64_t id = 0; id < limit; ++id) {
      if (counts[id] == 0) continue;
      const uint32_t copies = (counts[id] + kSlotTurns - 1) / kSlotTurns;
      const auto slot = static_cast<uint32_t>(slot_count_);
      distinct_.push_back({id - 1, slot, copies});
      first_[static_cast<size_t>(id)] = counts[id] = slot;
      last_[static_cast<size_t>(id)] = slot + copies - 1;
      slot_count_ += copies;
      turns |= copies > 1;
    }
    uint32_t* slots = slots_.data() + f * items_;
    if (!turns) {
      for (int64_t i = 0; i < items_; ++i) slots[i] = counts[number_of(i)];
      return;
    }
    for (int64_t i = 0; i < items_; ++i) {  // counts[id]: whose turn it is
      const int64_t id = number_of(i);
      const uint32_t slot = slots[i] = counts[id];
      counts[id] =
          slot == last_[static_cast<size_t>(id)] ? first_[static_cast<size_t>(id)] : slot + 1;
    }
  }

  int64_t items_ = 0, fields_ = 0, slot_count_ = 0;
  std::vector<uint32_t> slots_, counts_, first_, last_;
  std::vector<CodeRow> distinct_;
  std::vector<int64_t> ends_, found_, names_;
  std::vector<std::pair<int64_t, int64_t>> table_;
};

}  // namespace livrec
