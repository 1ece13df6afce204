// What the torch operators of prefix n-grams share: levels, codes and offsets that are safe to
// read.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>

#include "prefix_ngram.h"
#include "torch_glue.h"

namespace livrec {

using Optional = std::optional<Tensor>;

inline TableType table_type(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16 || type == ScalarType::Char,
                  "tables: must be float32, float16, bfloat16 or int8");
  return type == ScalarType::Float  ? TableType::f32
         : type == ScalarType::Half ? TableType::f16
         : type == ScalarType::Char ? TableType::i8
                                    : TableType::bf16;
}

// Numbers that are read as they are; int8 would need scales.
inline TableType float_type(ScalarType type, const char* name) {
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
      ": must be float32, float16 or bfloat16");
  return table_type(type);
}

inline CodeType code_type(const Tensor& codes, bool packed) {
  const auto type = codes.scalar_type();
  if (packed) {
    STD_TORCH_CHECK(type == ScalarType::Byte, "codes: must be uint8 where packed");
    return CodeType::packed;
  }
  switch (type) {
    case ScalarType::Byte:
      return CodeType::u8;
    case ScalarType::Char:
      return CodeType::i8;
    case ScalarType::Short:
      return CodeType::i16;
    case ScalarType::Int:
      return CodeType::i32;
    default:
      break;
  }
  STD_TORCH_CHECK(type == ScalarType::Long, "codes: must be integers");
  return CodeType::i64;
}

inline int64_t code_bytes(CodeType type) {
  switch (type) {
    case CodeType::i16:
      return 2;
    case CodeType::i32:
      return 4;
    case CodeType::i64:
      return 8;
    default:
      return 1;
  }
}

// What all levels are, group by group.
struct Levels {
  std::vector<PrefixLevel> levels;
  int64_t width = 0;

  Levels(const std::vector<int64_t>& sizes, const std::vector<int64_t>& rows,
         const std::vector<int64_t>& dims, const std::vector<int64_t>& groups, bool sum,
         const Text& hashing) {
    STD_TORCH_CHECK(!sizes.empty() && rows.size() == sizes.size() && dims.size() == sizes.size() &&
                        std::accumulate(groups.begin(), groups.end(), int64_t{0}) ==
                            static_cast<int64_t>(sizes.size()),
                    "levels: need a table each, and groups that add up to them");
    STD_TORCH_CHECK(
        !sum || std::all_of(dims.begin(), dims.end(), [&](int64_t dim) { return dim == dims[0]; }),
        "tables: mode sum needs one d");
    size_t group = 0, left = 0;
    uint64_t keys = 1;
    for (size_t l = 0; l < sizes.size(); ++l) {
      const bool begins = left == 0;
      if (begins) left = static_cast<size_t>(groups[group++]), keys = 1;
      --left;
      STD_TORCH_CHECK(sizes[l] > 0 && rows[l] > 0 && dims[l] > 0 &&
                          keys <= static_cast<uint64_t>(INT64_MAX / sizes[l]),
                      "levels: the keys of a group must fit in int64");
      keys *= static_cast<uint64_t>(sizes[l]);
      const auto own = static_cast<uint64_t>(rows[l]);
      PrefixLevel level{};
      level.size = sizes[l], level.begins = begins, level.rows = own, level.keys = keys;
      level.hash = own >= keys            ? KeyHash::none
                   : hashing == "modulo"  ? KeyHash::modulo
                   : hashing == "murmur3" ? KeyHash::murmur3
                                          : KeyHash::order_preserving;
      level.dim = dims[l];
      level.column = sum ? 0 : width;
      width = sum ? dims[l] : width + dims[l];
      levels.push_back(level);
    }
  }

  Codes codes_of(const Tensor& codes, bool packed) const {
    STD_TORCH_CHECK(codes.dim() == 2, "codes: must have two dimensions");
    const Codes made{codes.const_data_ptr(),
                     code_type(codes, packed),
                     codes.size(0),
                     codes.stride(0),
                     codes.stride(1),
                     levels.data(),
                     static_cast<int64_t>(levels.size()),
                     0};
    if (!packed)
      STD_TORCH_CHECK(codes.size(1) == made.level_count, "codes: must have a column per level");
    return made;
  }
};

inline void check_codes(const FirstBad& bad) {
  STD_TORCH_CHECK(!bad.any(), "codes: item ", bad.first(), " has a code out of range");
}

// Offsets that are safe to follow; null where there are none.
struct Offsets {
  Tensor held;
  const int64_t* data = nullptr;
  int64_t histories = 0;

  Offsets(const Optional& given, int64_t items, const char* name = "offsets") {
    if (!given) return;
    STD_TORCH_CHECK(
        given->dim() == 1 && given->size(0) > 0 && given->scalar_type() == ScalarType::Long, name,
        ": must be int64 [B + 1]");
    held = contiguous_of(*given);
    data = held.const_data_ptr<int64_t>();
    histories = held.size(0) - 1;
    STD_TORCH_CHECK(
        data[0] == 0 && data[histories] == items && std::is_sorted(data, data + histories + 1),
        name, ": must go from 0 to the number of items without decreasing");
  }
};

inline int64_t bits_of(int64_t size) {
  int64_t bits = 0;
  while (bits < 63 && (int64_t{1} << bits) < size) ++bits;
  return bits;
}

// Codes as they can be read: packed rows with their bytes side by side, and all of them.
inline Tensor readable(const Tensor& codes, bool packed, const std::vector<int64_t>& sizes) {
  if (!packed) return codes;
  int64_t bits = 0;
  for (const int64_t size : sizes) bits += bits_of(size);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(1) == (bits + 7) / 8,
                  "codes: packed rows must have ", (bits + 7) / 8, " bytes");
  return codes.size(1) == 1 || codes.stride(1) == 1 ? codes : contiguous_of(codes);
}

}  // namespace livrec
