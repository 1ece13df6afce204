// Which rows of each field's table a history names, each of them once: see code_fields.h.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "code_fields.h"
#include "prefix_torch.h"

namespace livrec {

// What one field of a history names: numbers, which are rows plus 1 or stand for `names`.
struct CodeField {
  const void* from;  // what lies below the numbers by 1, as codes of `type`
  CodeType type;
  int64_t stride;
  uint32_t past;                      // numbers from here on are out of range; they count as it
  std::vector<int64_t> names;         // rows by number, where they are not the numbers less 1
  std::vector<uint32_t> counts;       // of items, by number
  std::vector<uint32_t> next;         // the slot whose turn it is, by number
  std::vector<uint32_t> first, last;  // slots, where turns are taken
  bool turns;                         // whether any number has several
  bool in_order;  // slots follow each other as the numbers do, those of no item too
  uint32_t base;  // the slot of number 0, then

  int64_t row_of(int64_t number) const {
    return names.empty() ? number - 1 : names[static_cast<size_t>(number)];
  }
};

// Finds the rows of one history after the other; memory stays for the next.
class HistoryRows {
 public:
  // Items [begin, end); in runs, if asked for and if they would be long. Codes out of range are
  // noted and count as unknown.
  void read(const Codes& codes, int64_t begin, int64_t end, bool in_runs, FirstBad& first_bad) {
    items_ = end - begin, slot_count_ = 0;
    fields_.resize(static_cast<size_t>(codes.level_count));
    numbers_.resize(fields_.size() * static_cast<size_t>(items_));
    distinct_.clear();
    ends_.assign(1, 0);
    bool found = false;
    for (int64_t f = 0; f < codes.level_count; ++f)
      if (is_direct(codes, f)) {
        read_direct(codes, f, begin);
      } else {
        if (!found) find_rows(codes, begin, first_bad), found = true;
        read_found(codes.levels[f], f);
      }
    count(begin, first_bad);
    key_ = in_runs ? key_field() : -1;
    for (int64_t f = 0; f < codes.level_count; ++f) {
      number(field(f), f == key_);
      ends_.push_back(static_cast<int64_t>(distinct_.size()));
    }
    if (key_ >= 0) sort(field(key_));
    for (int64_t f = 0; f < codes.level_count; ++f)
      if (f != key_) place(field(f), numbers_of(f), slots_of(f));
  }

  CodeRows rows() const {
    const bool in_runs = key_ >= 0;
    return {items_,
            static_cast<int64_t>(fields_.size()),
            in_runs ? sorted_.data() : numbers_.data(),
            distinct_.data(),
            ends_.data(),
            slot_count_,
            key_,
            in_runs ? places_.data() : nullptr,
            in_runs ? run_ends_.data() : nullptr};
  }
  int64_t distinct() const { return static_cast<int64_t>(distinct_.size()); }

 private:
  static constexpr int64_t kRun = 4;      // items that a row must have to be worth a run
  static constexpr int64_t kBlock = 512;  // items whose codes stay near while they are read

  CodeField& field(int64_t f) { return fields_[static_cast<size_t>(f)]; }
  uint32_t* numbers_of(int64_t f) { return numbers_.data() + f * items_; }
  uint32_t* slots_of(int64_t f) { return (key_ < 0 ? numbers_ : sorted_).data() + f * items_; }

  // Rows few enough to count in an array.
  bool is_small(uint64_t rows) const {
    return rows < static_cast<uint64_t>(std::min<int64_t>(8 * items_ + 4096, 1 << 30));
  }

  // Whether a field's codes are its rows, as they lie.
  bool is_direct(const Codes& codes, int64_t f) const {
    const bool alone =
        codes.levels[f].begins && (f + 1 == codes.level_count || codes.levels[f + 1].begins);
    return alone && codes.type != CodeType::packed && codes.levels[f].hash == KeyHash::none &&
           is_small(codes.levels[f].rows);
  }

  void read_direct(const Codes& codes, int64_t f, int64_t begin) {
    CodeField& own = field(f);
    const int64_t at = begin * codes.row_stride + f * codes.column_stride;
    own.from = static_cast<const char*>(codes.data) + at * code_bytes(codes.type);
    own.type = codes.type, own.stride = codes.row_stride;
    own.past = static_cast<uint32_t>(codes.levels[f].size) + 1;
    own.names.clear();
  }

  void find_rows(const Codes& codes, int64_t begin, FirstBad& first_bad) {
    found_.resize(numbers_.size());
    const int64_t fields = codes.level_count;
    std::vector<int64_t> block(static_cast<size_t>(fields * kPrefixBlock));
    for (int64_t at = 0; at < items_; at += kPrefixBlock) {
      const int64_t some = std::min(kPrefixBlock, items_ - at);
      first_bad.note(
          LIVREC_CALL(prefix_ngram_rows, codes, begin + at, begin + at + some, block.data()));
      for (int64_t f = 0; f < fields; ++f)
        std::copy_n(block.data() + f * kPrefixBlock, some, found_.data() + f * items_ + at);
    }
  }

  void read_found(const PrefixLevel& level, int64_t f) {
    CodeField& own = field(f);
    int64_t* rows = found_.data() + f * items_;
    own.from = rows, own.type = CodeType::i64, own.stride = 1;
    own.names.clear();
    if (is_small(level.rows)) {
      own.past = static_cast<uint32_t>(level.rows) + 1;
      return;
    }
    // Too many rows for an array: theirs are numbered as they come, through a table of hashes.
    size_t places = 16;
    while (places < static_cast<size_t>(2 * items_)) places *= 2;
    table_.assign(places, {-2, 0});
    for (int64_t i = 0; i < items_; ++i) {
      size_t place = static_cast<size_t>(rows[i]) * 0x9e3779b97f4a7c15ull >> 20 & (places - 1);
      while (table_[place].first != rows[i] && table_[place].first != -2)
        place = (place + 1) & (places - 1);
      if (table_[place].first == -2) {
        table_[place] = {rows[i], static_cast<int64_t>(own.names.size())};
        own.names.push_back(rows[i]);
      }
      rows[i] = table_[place].second - 1;
    }
    own.past = static_cast<uint32_t>(own.names.size());
  }

  // Numbers the items and counts those of each number; where any is out of range, the field's are
  // all unknown.
  void count(int64_t begin, FirstBad& first_bad) {
    for (CodeField& own : fields_) own.counts.assign(static_cast<size_t>(own.past) + 1, 0);
    for (int64_t at = 0; at < items_; at += kBlock)
      for (int64_t f = 0; f < static_cast<int64_t>(fields_.size()); ++f) {
        CodeField& own = field(f);
        const int64_t first = at * own.stride * code_bytes(own.type);
        LIVREC_CALL(code_numbers, static_cast<const char*>(own.from) + first, own.type, own.stride,
                    std::min(kBlock, items_ - at), own.past, numbers_of(f) + at, own.counts.data());
      }
    for (int64_t f = 0; f < static_cast<int64_t>(fields_.size()); ++f) {
      CodeField& own = field(f);
      if (own.counts[own.past] == 0) continue;
      uint32_t* numbers = numbers_of(f);
      first_bad.note(begin + (std::find(numbers, numbers + items_, own.past) - numbers));
      std::fill_n(numbers, items_, 0);
      own.past = 0;
      own.counts.assign(1, static_cast<uint32_t>(items_));
    }
  }

  // The field of the most rows, which its items name often enough; -1: there is none.
  int64_t key_field() const {
    int64_t key = -1, most = 0;
    for (size_t f = 0; f < fields_.size(); ++f) {
      const auto rows = static_cast<int64_t>(fields_[f].past);
      if (rows * kRun <= items_ && rows > most) key = static_cast<int64_t>(f), most = rows;
    }
    return key;
  }

  // Gives each number that occurs its slots.
  void number(CodeField& own, bool is_key) {
    const size_t numbers = own.counts.size();
    uint32_t most = 0;
    size_t some = 0;
    for (const uint32_t items : own.counts) most = std::max(most, items), some += items != 0;
    own.turns = !is_key && most > kSlotTurns;
    own.in_order = !is_key && !own.turns && 2 * some >= numbers;
    own.next.resize(numbers);
    own.base = static_cast<uint32_t>(slot_count_);
    distinct_.resize(distinct_.size() + some);
    CodeRow* next_row = distinct_.data() + distinct_.size() - some;
    for (size_t n = 0; n < numbers; ++n) {
      const uint32_t items = own.counts[n];
      if (items == 0) continue;
      const uint32_t copies = own.turns ? (items + kSlotTurns - 1) / kSlotTurns : 1;
      own.next[n] = static_cast<uint32_t>(own.in_order ? own.base + n : slot_count_);
      *next_row++ = {own.row_of(static_cast<int64_t>(n)), own.next[n], copies};
      slot_count_ += copies;
    }
    if (own.in_order) slot_count_ = own.base + static_cast<int64_t>(numbers);
    if (!own.turns) return;
    own.first = own.last = own.next;
    for (size_t n = 0; n < numbers; ++n)
      own.last[n] += (own.counts[n] + kSlotTurns - 1) / kSlotTurns - 1;
  }

  // Finds the runs of a field and where they put the items, which get the field's slots.
  void sort(CodeField& own) {
    places_.resize(static_cast<size_t>(items_));
    sorted_.resize(numbers_.size());
    run_ends_.clear();
    uint32_t* slots = slots_of(key_);
    uint32_t begin = 0;
    for (size_t n = 0; n < own.counts.size(); ++n) {
      const uint32_t items = own.counts[n];
      if (items == 0) continue;
      std::fill_n(slots + begin, items, own.next[n]);
      own.next[n] = begin;
      run_ends_.push_back(begin += items);
    }
    uint32_t *next = own.next.data(), *places = places_.data();
    const uint32_t* numbers = numbers_of(key_);
    for (int64_t i = 0; i < items_; ++i) places[i] = next[numbers[i]]++;
  }

  // Gives each item its slot of a field, where the item has been put.
  void place(CodeField& own, const uint32_t* numbers, uint32_t* slots) {
    if (own.in_order) {
      const uint32_t base = own.base;
      place(slots, [&](int64_t i) { return base + numbers[i]; });
    } else if (own.turns) {
      uint32_t* next = own.next.data();
      const uint32_t *first = own.first.data(), *last = own.last.data();
      place(slots, [&](int64_t i) {
        const uint32_t n = numbers[i], slot = next[n];
        next[n] = slot == last[n] ? first[n] : slot + 1;
        return slot;
      });
    } else {
      const uint32_t* next = own.next.data();
      place(slots, [&](int64_t i) { return next[numbers[i]]; });
    }
  }

  template <typename SlotOf>
  void place(uint32_t* slots, const SlotOf& slot_of) const {
    if (key_ < 0) {
      for (int64_t i = 0; i < items_; ++i) slots[i] = slot_of(i);
    } else {
      const uint32_t* places = places_.data();
      for (int64_t i = 0; i < items_; ++i) slots[places[i]] = slot_of(i);
    }
  }

  int64_t items_ = 0, slot_count_ = 0, key_ = -1;
  std::vector<CodeField> fields_;
  std::vector<uint32_t> numbers_, sorted_, places_, run_ends_;
  std::vector<CodeRow> distinct_;
  std::vector<int64_t> ends_, found_;
  std::vector<std::pair<int64_t, int64_t>> table_;
};

}  // namespace livrec
