// What the torch operators of prefix n-grams that go through gradients share: codes sorted group by
// group, and the gradient as it lies.
#pragma once

#include "prefix_ngram_gradient.h"
#include "prefix_torch.h"

namespace livrec {

constexpr int64_t kSortChunks = 16;  // a fixed number: the order does not depend on the threads

// The numbers 0 .. count - 1 ordered by `words`, equal ones as they were: a radix sort of eight
// bits at a time, over words of `bits` bits. `order` comes in some order and leaves sorted, as
// words do.
inline void sort(std::vector<uint64_t>& words, std::vector<uint32_t>& order, int64_t bits) {
  const int64_t count = static_cast<int64_t>(words.size());
  const int64_t chunk = (count + kSortChunks - 1) / kSortChunks;
  std::vector<uint64_t> words_to(words.size());
  std::vector<uint32_t> order_to(words.size());
  std::vector<int64_t> places(kSortChunks * 256);
  for (int64_t shift = 0; shift < bits; shift += 8) {
    const auto each = [&](int64_t c, const auto& visit) {
      const int64_t end = std::min(count, (c + 1) * chunk);
      for (int64_t i = c * chunk; i < end; ++i)
        visit(static_cast<size_t>(i), (words[static_cast<size_t>(i)] >> shift) & 255);
    };
    std::fill(places.begin(), places.end(), 0);
    torch::stable::parallel_for(0, kSortChunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        each(c, [&](size_t, uint64_t digit) { ++places[static_cast<size_t>(c) * 256 + digit]; });
    });
    int64_t place = 0;
    for (size_t digit = 0; digit < 256; ++digit)
      for (size_t c = 0; c < kSortChunks; ++c) {
        const int64_t size = places[c * 256 + digit];
        places[c * 256 + digit] = place;
        place += size;
      }
    torch::stable::parallel_for(0, kSortChunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        each(c, [&](size_t i, uint64_t digit) {
          const auto to = static_cast<size_t>(places[static_cast<size_t>(c) * 256 + digit]++);
          words_to[to] = words[i];
          order_to[to] = order[i];
        });
    });
    words.swap(words_to);
    order.swap(order_to);
  }
}

// The codes of a group, sorted; `job` is told of them.
struct SortedCodes {
  std::vector<int64_t> shifts;
  std::vector<uint64_t> words;
  std::vector<uint32_t> order;
  std::vector<uint8_t> depths;

  explicit SortedCodes(PrefixGradient& job)
      : shifts(static_cast<size_t>(job.codes.level_count)),
        words(static_cast<size_t>(job.codes.items)),
        order(words.size()),
        depths(words.size()) {
    const int64_t items = job.codes.items, depth = job.codes.level_count;
    int64_t bits = 0;
    for (int64_t l = depth - 1; l >= 0; --l) {
      shifts[static_cast<size_t>(l)] = bits;
      bits += bits_of(job.codes.levels[l].size);
    }
    STD_TORCH_CHECK(bits < 64 && depth <= 63, "levels: codes side by side must fit in 63 bits");
    FirstBad first_bad;
    torch::stable::parallel_for(0, items, 4096, [&](int64_t begin, int64_t end) {
      first_bad.note(LIVREC_CALL(prefix_gradient_words, job.codes, shifts.data(), begin, end,
                                 words.data(), depths.data()));
    });
    check_codes(first_bad);
    std::iota(order.begin(), order.end(), 0u);
    const bool unknown =
        std::any_of(depths.begin(), depths.end(), [&](uint8_t known) { return known < depth; });
    if (unknown) {  // shallow items first, so that they come first among equal words
      std::vector<uint64_t> known(depths.begin(), depths.end());
      sort(known, order, 8);
      std::vector<uint64_t> moved(words.size());
      for (size_t i = 0; i < words.size(); ++i) moved[i] = words[order[i]];
      words.swap(moved);
    }
    sort(words, order, bits);
    job.depths = unknown ? depths.data() : nullptr;
    job.sorted = words.data();
    job.order = order.data();
    job.shifts = shifts.data();
  }
  SortedCodes(const SortedCodes&) = delete;
};

// The history of every item.
inline std::vector<int64_t> histories_of(const Offsets& offsets, int64_t items) {
  std::vector<int64_t> history(static_cast<size_t>(offsets.data ? items : 0));
  for (int64_t h = 0; h < offsets.histories; ++h)
    std::fill(history.begin() + offsets.data[h], history.begin() + offsets.data[h + 1], h);
  return history;
}

// The gradient of a lookup's result, and the codes it is of, as they can be read.
class UpstreamGradient {
 public:
  UpstreamGradient(const Tensor& grad, const Tensor& codes, const Levels& levels,
                   const std::vector<int64_t>& sizes, bool sum, const Optional& offsets,
                   const std::optional<Text>& pool, bool packed)
      : levels_(levels),
        codes_(readable(codes, packed, sizes)),
        grad_(grad.dim() != 2 || grad.size(1) == 1 || grad.stride(1) == 1 ? grad
                                                                          : contiguous_of(grad)),
        offsets_(offsets, codes_.size(0)),
        history_(histories_of(offsets_, codes_.size(0))),
        packed_(packed) {
    const int64_t rows = offsets_.data ? offsets_.histories : codes_.size(0);
    STD_TORCH_CHECK(codes_.size(0) <= UINT32_MAX, "codes: at most 2^32 - 1 items");
    STD_TORCH_CHECK(grad_.dim() == 2 && grad_.size(0) == rows && grad_.size(1) == levels_.width,
                    "grad: must have the shape of the lookup");
    job_.grad = grad_.const_data_ptr();
    job_.grad_type = float_type(grad_.scalar_type(), "grad");
    job_.grad_stride = grad_.stride(0);
    job_.sum = sum;
    job_.history = offsets_.data ? history_.data() : nullptr;
    job_.offsets = pool && *pool == "mean" ? offsets_.data : nullptr;
  }
  UpstreamGradient(const UpstreamGradient&) = delete;

  // Of `count` levels from number `from` on: a group.
  PrefixGradient of_levels(int64_t from, int64_t count) const {
    PrefixGradient job = job_;
    job.codes = levels_.codes_of(codes_, packed_);
    job.codes.levels += from;
    job.codes.level_count = count;
    job.codes.skipped = from;
    return job;
  }

 private:
  Levels levels_;
  Tensor codes_, grad_;
  Offsets offsets_;
  std::vector<int64_t> history_;
  bool packed_;
  PrefixGradient job_{};
};

}  // namespace livrec
