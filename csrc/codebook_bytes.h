// The search in bytes (see codebook.h), between the two sources of a codebook's CPU kernels. Where
// the level has no multiplication of bytes, pack_bytes leaves `in_bytes` false.
#pragma once

#include "codebook.h"

namespace livrec {
namespace LIVREC_ISA {

int64_t bytes_memory(int64_t size, int64_t dim);
void pack_bytes(Codebook& codebook, void* memory);
int64_t bytes_scratch(int64_t dim);

// Finds the nearest codewords of all rows but those that it returns, copied side by side, whose
// numbers in the block go to `left`: rows with too many candidates, or that are not finite.
Rows nearest_in_bytes(const Codebook& codebook, const Rows& rows, int32_t* codes, int32_t* left,
                      void* scratch);

}  // namespace LIVREC_ISA
}  // namespace livrec
