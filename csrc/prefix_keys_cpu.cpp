#include "prefix_ngram_gradient.h"

#include "hashes.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

template <typename Code>
void read_column(const Codes& codes, int64_t level, int64_t begin, int64_t count, int64_t* out) {
  const Code* from = static_cast<const Code*>(codes.data) + begin * codes.row_stride +
                     (codes.skipped + level) * codes.column_stride;
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(from[i * codes.row_stride]);
}

int width_of(int64_t size) {
  int bits = 0;
  while (bits < 63 && (int64_t{1} << bits) < size) ++bits;
  return bits;
}

void read_packed(const Codes& codes, int64_t level, int64_t begin, int64_t count, int64_t* out) {
  int64_t at = 0;
  for (int64_t l = -codes.skipped; l < level; ++l) at += width_of(codes.levels[l].size);
  const int width = width_of(codes.levels[level].size);
  const uint8_t* row = static_cast<const uint8_t*>(codes.data) + begin * codes.row_stride;
  for (int64_t i = 0; i < count; ++i, row += codes.row_stride) {
    uint64_t value = 0;
    for (int64_t bit = at; bit < at + width;) {
      const int64_t left = bit % 8,
                    take = 8 - left < at + width - bit ? 8 - left : at + width - bit;
      const uint64_t piece = (row[bit / 8] >> left) & ((1u << take) - 1u);
      value |= piece << (bit - at);
      bit += take;
    }
    out[i] = static_cast<int64_t>(value);
  }
}

void read_codes(const Codes& codes, int64_t level, int64_t begin, int64_t count, int64_t* out) {
  switch (codes.type) {
    case CodeType::u8:
      return read_column<uint8_t>(codes, level, begin, count, out);
    case CodeType::i8:
      return read_column<int8_t>(codes, level, begin, count, out);
    case CodeType::i16:
      return read_column<int16_t>(codes, level, begin, count, out);
    case CodeType::i32:
      return read_column<int32_t>(codes, level, begin, count, out);
    case CodeType::i64:
      return read_column<int64_t>(codes, level, begin, count, out);
    case CodeType::packed:
      return read_packed(codes, level, begin, count, out);
  }
}

// keys to rows; -1 stays.
void hash_keys(const PrefixLevel& level, const int64_t* keys, int64_t count, int64_t* rows) {
  const uint64_t mask = level.rows - 1;
  const bool power = (level.rows & mask) == 0;
  if (level.hash == KeyHash::none || (level.hash == KeyHash::modulo && power)) {
    const int64_t kept = level.hash == KeyHash::none ? -1 : static_cast<int64_t>(mask);
    for (int64_t i = 0; i < count; ++i) rows[i] = keys[i] < 0 ? -1 : keys[i] & kept;
    return;
  }
  const auto scale =
      level.hash == KeyHash::order_preserving
          ? static_cast<uint64_t>((static_cast<unsigned __int128>(level.rows) << 64) / level.keys)
          : 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto key = static_cast<uint64_t>(keys[i]);
    uint64_t row = key;
    if (level.hash == KeyHash::order_preserving)
      row = static_cast<uint64_t>((static_cast<unsigned __int128>(key) * scale) >> 64);
    else {
      const uint64_t hashed = level.hash == KeyHash::murmur3 ? murmur3(key) : key;
      row = power ? hashed & mask : hashed % level.rows;
    }
    rows[i] = keys[i] < 0 ? -1 : static_cast<int64_t>(row);
  }
}

}  // namespace

int64_t prefix_ngram_rows(const Codes& codes, int64_t begin, int64_t end, int64_t* rows) {
  int64_t keys[kPrefixBlock] = {}, given[kPrefixBlock];
  const int64_t count = end - begin;
  int64_t first_bad = -1;
  for (int64_t l = 0; l < codes.level_count; ++l) {
    const PrefixLevel& level = codes.levels[l];
    read_codes(codes, l, begin, count, given);
    int64_t outside = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t before = level.begins ? 0 : keys[i], code = given[i];
      outside |= static_cast<int64_t>(code < -1) | static_cast<int64_t>(code >= level.size);
      keys[i] = before < 0 || code < 0 || code >= level.size ? -1 : before * level.size + code;
    }
    for (int64_t i = 0; outside && i < count; ++i)
      if ((given[i] < -1 || given[i] >= level.size) && (first_bad < 0 || begin + i < first_bad))
        first_bad = begin + i;
    hash_keys(level, keys, count, rows + l * kPrefixBlock);
  }
  return first_bad;
}

void prefix_gradient_hash(const PrefixLevel& level, const int64_t* keys, int64_t count,
                          int64_t* rows) {
  hash_keys(level, keys, count, rows);
}

int64_t prefix_gradient_words(const Codes& codes, const int64_t* shifts, int64_t begin, int64_t end,
                              uint64_t* words, uint8_t* depths) {
  int64_t given[kPrefixBlock], known[kPrefixBlock], first_bad = -1;
  for (int64_t item = begin; item < end; item += kPrefixBlock) {
    const int64_t count = item + kPrefixBlock < end ? kPrefixBlock : end - item;
    uint64_t* to = words + item;
    for (int64_t i = 0; i < count; ++i) to[i] = 0, known[i] = 0;
    for (int64_t l = 0; l < codes.level_count; ++l) {
      read_codes(codes, l, item, count, given);
      const int64_t size = codes.levels[l].size, shift = shifts[l];
      int64_t outside = 0;
      for (int64_t i = 0; i < count; ++i) {
        outside |= static_cast<int64_t>(given[i] < -1) | static_cast<int64_t>(given[i] >= size);
        const bool knows = known[i] == l && given[i] >= 0;
        to[i] |= knows ? static_cast<uint64_t>(given[i]) << shift : 0;
        known[i] += knows ? 1 : 0;
      }
      for (int64_t i = 0; outside && i < count; ++i)
        if ((given[i] < -1 || given[i] >= size) && (first_bad < 0 || item + i < first_bad))
          first_bad = item + i;
    }
    for (int64_t i = 0; i < count; ++i) depths[item + i] = static_cast<uint8_t>(known[i]);
  }
  return first_bad;
}

}  // namespace LIVREC_ISA
}  // namespace livrec
