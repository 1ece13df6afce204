// What the torch operators of prefix n-grams that go through gradients share: codes sorted group by
// group, and the gradient as it lies.
#pragma once

#include "prefix_ngram_gradient.h"
#include "prefix_torch.h"
#include "radix_sort_torch.h"

namespace livrec {

// The codes of a group, sorted; `job` is told of them.
class SortedCodes {
 public:
  explicit SortedCodes(PrefixGradient& job)
      : shifts_(static_cast<size_t>(job.codes.level_count)), room_(job.codes.items * (8 + 4 + 1)) {
    const int64_t items = job.codes.items, depth = job.codes.level_count;
    int64_t bits = 0;
    for (int64_t l = depth - 1; l >= 0; --l) {
      shifts_[static_cast<size_t>(l)] = bits;
      bits += bits_of(job.codes.levels[l].size);
    }
    STD_TORCH_CHECK(bits < 64 && depth <= 63, "levels: codes side by side must fit in 63 bits");
    auto* words = static_cast<uint64_t*>(room_.data());
    auto* order = reinterpret_cast<uint32_t*>(words + items);
    auto* depths = reinterpret_cast<uint8_t*>(order + items);
    FirstBad first_bad;
    torch::stable::parallel_for(0, items, 4096, [&](int64_t begin, int64_t end) {
      first_bad.note(
          LIVREC_CALL(prefix_gradient_words, job.codes, shifts_.data(), begin, end, words, depths));
    });
    check_codes(first_bad);
    uint8_t least = 255;
    for (int64_t i = 0; i < items; ++i) least = std::min(least, depths[i]);
    const bool unknown = least < depth;
    if (unknown) {  // shallow items first, so that they come first among equal words
      std::vector<uint64_t> known(depths, depths + items), given(words, words + items);
      sort(known.data(), order, items, 8, false);
      for (int64_t i = 0; i < items; ++i) words[i] = given[order[i]];
    }
    sort(words, order, items, bits, unknown);
    job.depths = unknown ? depths : nullptr;
    job.sorted = words;
    job.order = order;
    job.shifts = shifts_.data();
  }
  SortedCodes(const SortedCodes&) = delete;

 private:
  std::vector<int64_t> shifts_;
  Scratch room_;  // of words, order and depths
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
