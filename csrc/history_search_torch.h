// What both history searches share around their scores: which items may be found, and the best.
#pragma once

#include <cstring>
#include <functional>

#include "history_search.h"
#include "prefix_torch.h"

namespace livrec {

// A column of integers of any type, an entry per item.
class Column {
 public:
  explicit Column(const Optional& given, int64_t items) {
    if (!given) return;
    held_ = contiguous_of(*given);
    STD_TORCH_CHECK(held_->dim() == 1 && held_->size(0) == items,
                    "item_ids, item_bits, item_times: must be [T]");
    data_ = held_->const_data_ptr();
    type_ = held_->scalar_type();
  }
  bool given() const { return held_.has_value(); }
  int64_t at(int64_t item) const {
    switch (type_) {
      case ScalarType::Byte:
        return static_cast<const uint8_t*>(data_)[item];
      case ScalarType::Char:
        return static_cast<const int8_t*>(data_)[item];
      case ScalarType::Short:
        return static_cast<const int16_t*>(data_)[item];
      case ScalarType::Int:
        return static_cast<const int32_t*>(data_)[item];
      default:
        return static_cast<const int64_t*>(data_)[item];
    }
  }

 private:
  Optional held_;
  const void* data_ = nullptr;
  ScalarType type_ = ScalarType::Long;
};

// A number per candidate.
class Asked {
 public:
  Asked(const Optional& given, int64_t count) {
    if (!given) return;
    held_ = contiguous_of(*given);
    STD_TORCH_CHECK(held_->numel() == count && held_->scalar_type() == ScalarType::Long,
                    "query_ids, required_bits, since, until: must be int64 [B, C]");
    data_ = held_->const_data_ptr<int64_t>();
  }
  bool given() const { return held_.has_value(); }
  int64_t at(int64_t candidate) const { return data_[candidate]; }

 private:
  Optional held_;
  const int64_t* data_ = nullptr;
};

// Which items a candidate may find.
struct SearchMasks {
  Column ids, bits, times;
  Asked wanted, required, since, until;

  SearchMasks(const Optional& item_ids, const Optional& query_ids, const Optional& item_bits,
              const Optional& required_bits, const Optional& item_times,
              const Optional& since_given, const Optional& until_given, int64_t items,
              int64_t candidates)
      : ids(item_ids, items),
        bits(item_bits, items),
        times(item_times, items),
        wanted(query_ids, candidates),
        required(required_bits, candidates),
        since(since_given, candidates),
        until(until_given, candidates) {
    STD_TORCH_CHECK(ids.given() == wanted.given() && bits.given() == required.given() &&
                        times.given() == (since.given() || until.given()),
                    "item_ids, item_bits, item_times: need what is asked of them");
  }

  bool any() const { return ids.given() || bits.given() || times.given(); }

  // `candidate` counts over all users.
  bool may(int64_t item, int64_t candidate) const {
    if (ids.given()) {
      const int64_t id = wanted.at(candidate);
      if (id == -1 || ids.at(item) != id) return false;
    }
    if (bits.given()) {
      const int64_t needed = required.at(candidate);
      if ((bits.at(item) & needed) != needed) return false;
    }
    if (since.given() && times.at(item) < since.at(candidate)) return false;
    return !until.given() || times.at(item) < until.at(candidate);
  }
};

// The k best of the items shown, as numbers that order by score and then by position.
class TopK {
 public:
  explicit TopK(int64_t k) : k_(k) {}

  // Ordered as floats are, -0 as 0, with the position below.
  static uint64_t number(float score, int64_t position) {
    uint32_t bits;
    const float value = score + 0.0f;
    std::memcpy(&bits, &value, 4);
    bits ^= (bits >> 31) ? 0xffffffffu : 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(position);
  }

  // Makes room for `count` items more, and for as many again as are kept before the next cut.
  void expect(int64_t count) {
    if (used_ + count > static_cast<int64_t>(numbers_.size()))
      numbers_.resize(static_cast<size_t>(std::max(used_ + count, 2 * k_ + 4 * kSearchBlock)));
  }

  // Of items that are shown the latest first: ties fall below the least kept.
  void show(float score, int64_t position) {
    const uint64_t one = number(score, position);
    numbers_[static_cast<size_t>(used_)] = one;
    used_ += one > least_;
  }

  void settle() {
    if (used_ >= 2 * k_ + 2 * kSearchBlock) cut();
  }

  // From now on scores below `bound` are as if they had not been shown; before any is.
  void start_from(float bound) { least_ = number(bound, 0) - 1; }

  int64_t found() const { return used_; }

  // The least of the k best; -inf where there are fewer.
  float last() {
    if (used_ > k_) cut();
    return used_ < k_ ? -INFINITY
                      : score(*std::min_element(numbers_.begin(), numbers_.begin() + k_));
  }

  // Scores below it need not be shown.
  float least() const { return least_ == 0 ? -INFINITY : score(least_); }

  void take(const TopK& other) {
    numbers_.resize(static_cast<size_t>(used_));
    numbers_.insert(numbers_.end(), other.numbers_.begin(), other.numbers_.begin() + other.used_);
    used_ += other.used_;
    if (used_ > k_) cut();
  }

  // The best first; past them, up to `count`, -inf and -1.
  void write(int64_t count, float* scores, int64_t* positions) {
    if (used_ > k_) cut();
    sort();
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = i < used_ ? score(numbers_[static_cast<size_t>(i)]) : -INFINITY;
      positions[i] =
          i < used_ ? static_cast<int64_t>(numbers_[static_cast<size_t>(i)] & 0xffffffffu) : -1;
    }
  }

 private:
  static float score(uint64_t number) {
    auto bits = static_cast<uint32_t>(number >> 32);
    bits ^= (bits >> 31) ? 0x80000000u : 0xffffffffu;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  // The greatest first. By buckets of equal width, in which little is left to compare: branches on
  // what is not sorted at all are wrong every other time.
  void sort() {
    if (used_ < 2) return;
    constexpr int kBits = 8, kBuckets = 1 << kBits;
    const auto [least, greatest] = std::minmax_element(numbers_.begin(), numbers_.begin() + used_);
    const uint64_t top = *greatest, range = top - *least;
    const int shift = std::max(0, 64 - __builtin_clzll(range) - kBits);
    int64_t ends[kBuckets] = {};
    for (int64_t i = 0; i < used_; ++i) ++ends[(top - numbers_[static_cast<size_t>(i)]) >> shift];
    for (int64_t b = 0, sum = 0; b < kBuckets; ++b) sum += ends[b], ends[b] = sum - ends[b];
    rest_.resize(numbers_.size());
    for (int64_t i = 0; i < used_; ++i) {
      const uint64_t one = numbers_[static_cast<size_t>(i)];
      rest_[static_cast<size_t>(ends[(top - one) >> shift]++)] = one;
    }
    rest_.swap(numbers_);
    for (int64_t b = 0, begin = 0; b < kBuckets; begin = ends[b++])
      if (ends[b] - begin > 1)
        std::sort(numbers_.begin() + begin, numbers_.begin() + ends[b], std::greater<uint64_t>());
  }

  // Keeps the k greatest. Quickselect whose partition has no branches: those of std::nth_element
  // are wrong every other time.
  void cut() {
    rest_.resize(numbers_.size());
    uint64_t *from = numbers_.data(), *rest = rest_.data();
    int64_t count = used_, wanted = k_;
    while (count > wanted) {
      const uint64_t a = from[count / 4], b = from[count / 2], c = from[count - 1];
      uint64_t pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
      int64_t greater = split(from, count, pivot, rest);
      std::copy_n(rest, count - greater, from + greater);
      if (greater == 0) {  // the pivot is the greatest: numbers are distinct
        std::iter_swap(from, std::find(from, from + count, pivot));
        greater = 1;
      }
      if (greater > wanted) {
        count = greater;
      } else {
        from += greater, count -= greater, wanted -= greater;
        if (wanted == 0) break;
      }
    }
    used_ = k_;
    least_ = *std::min_element(numbers_.begin(), numbers_.begin() + k_);
  }

  // Moves those above the pivot to the front and the others to `rest`; returns how many are above.
  static int64_t split(uint64_t* from, int64_t count, uint64_t pivot, uint64_t* rest) {
    int64_t above = 0, below = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t one = from[i];
      from[above] = rest[below] = one;
      const bool is_above = one > pivot;
      above += is_above, below += !is_above;
    }
    return above;
  }

  int64_t k_, used_ = 0;
  uint64_t least_ = 0;
  std::vector<uint64_t> numbers_, rest_;
};

}  // namespace livrec
