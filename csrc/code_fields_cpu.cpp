#include "code_fields.h"

namespace livrec {
namespace LIVREC_ISA {
namespace {

// The stride is known to the compiler where it is small: it then reads codes by whole vectors.
template <typename Code, int kStride>
void number(const Code* codes, int64_t stride, int64_t items, uint32_t past, uint32_t* numbers) {
  const int64_t step = kStride ? kStride : stride;
  for (int64_t i = 0; i < items; ++i) {
    if (sizeof(Code) < 8) {
      const auto number = static_cast<uint32_t>(static_cast<int32_t>(codes[i * step])) + 1;
      numbers[i] = number < past ? number : past;
    } else {
      const auto number = static_cast<uint64_t>(static_cast<int64_t>(codes[i * step])) + 1;
      numbers[i] = number < past ? static_cast<uint32_t>(number) : past;
    }
  }
}

template <typename Code>
void number_any(const void* from, int64_t stride, int64_t items, uint32_t past, uint32_t* numbers) {
  const auto* codes = static_cast<const Code*>(from);
  switch (stride) {
    case 1:
      return number<Code, 1>(codes, stride, items, past, numbers);
    case 2:
      return number<Code, 2>(codes, stride, items, past, numbers);
    case 3:
      return number<Code, 3>(codes, stride, items, past, numbers);
    case 4:
      return number<Code, 4>(codes, stride, items, past, numbers);
    default:
      return number<Code, 0>(codes, stride, items, past, numbers);
  }
}

}  // namespace

void code_numbers(const void* codes, CodeType type, int64_t stride, int64_t items, uint32_t past,
                  uint32_t* numbers, uint32_t* counts) {
  switch (type) {
    case CodeType::u8:
      number_any<uint8_t>(codes, stride, items, past, numbers);
      break;
    case CodeType::i8:
      number_any<int8_t>(codes, stride, items, past, numbers);
      break;
    case CodeType::i16:
      number_any<int16_t>(codes, stride, items, past, numbers);
      break;
    case CodeType::i32:
      number_any<int32_t>(codes, stride, items, past, numbers);
      break;
    default:
      number_any<int64_t>(codes, stride, items, past, numbers);
  }
  for (int64_t i = 0; i < items; ++i) ++counts[numbers[i]];
}

}  // namespace LIVREC_ISA
}  // namespace livrec
