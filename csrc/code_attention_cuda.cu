#include "code_blocks_cuda.h"

namespace livrec {
namespace {

// Writes the sums of all terms, those of one field's rows, and the greatest logits.
__device__ void write_sums(const Call& call, const Block& block) {
  Quad total = {};
  const int begin = call.starts[call.thinnest], end = call.starts[call.thinnest + 1];
  for (int row = begin + block.place; row < end; row += block.stride) {
    const Quad own = block.logits[row * block.quads + block.quad];
    for (int c = 0; c < 4; ++c) total.x[c] += own.x[c];
  }
  block.scratch[threadIdx.x] = total;
  __syncthreads();
  if (block.place > 0) return;
  for (int i = 1; i < block.stride && i < end - begin; ++i) {
    const Quad own = block.scratch[i * block.quads + block.quad];
    for (int c = 0; c < 4; ++c) total.x[c] += own.x[c];
  }
  for (int c = 0; c < 4; ++c) {
    const int64_t column = block.first + 4 * block.quad + c;
    if (column >= call.columns) continue;
    const int64_t at = block.piece * call.columns + place_of(call, column);
    call.peaks[at] = total.x[c] == 0.0f ? -INFINITY : block.peaks[block.quad].x[c];
    call.sums[at] = total.x[c];
  }
}

template <typename Number>
__global__ void __launch_bounds__(kThreads, 2) attend(const __grid_constant__ Call call) {
  LIVREC_SHARED(Quad, memory);
  for (int64_t work = blockIdx.x; work < call.pieces * call.tiles; work += gridDim.x) {
    const int64_t index = work / call.tiles, tile = work % call.tiles;
    const Piece piece = piece_at(call, index);
    if (tile == 0 && threadIdx.x == 0) call.owners[index] = piece.items ? piece.user : -1;
    if (piece.items == 0) continue;
    const Block block = block_of(call, piece, index, tile, memory);
    put_tables<Number>(call, block, nullptr);
    put_peaks(call, block);
    const Quad peak = block.peaks[block.quad];
    const auto weigh = [&](int item, uint16_t* rows, int stride) {
      Quad own = logits_of(call, block, item, rows, stride);
      for (int c = 0; c < 4; ++c) own.x[c] = expf(own.x[c] - peak.x[c]);
      return own;
    };
    add_items(call, block, weigh, [](int, int) {});
    write_sums(call, block);
    write_parts<Number>(call, block, call.values, call.value_dim, 1.0f);
    __syncthreads();
  }
}

// Puts the pieces of a history together; a thread takes a number of `out`.
template <typename Number>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Call call) {
  const int64_t each = call.columns * call.value_dim;
  for (int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
       at < call.job.users * each; at += gridDim.x * static_cast<int64_t>(kThreads)) {
    const int64_t user = at / each, place = at % each / call.value_dim, dim = at % call.value_dim;
    const int64_t begin = bound_of(call, user), end = bound_of(call, user + 1);
    const int64_t first = user + begin / call.size;
    const int64_t last = end > begin ? user + (end - 1) / call.size : first - 1;
    float peak = -INFINITY;
    for (int64_t p = first; p <= last; ++p)
      if (call.owners[p] == user) peak = fmaxf(peak, call.peaks[p * call.columns + place]);
    const float shift = peak == -INFINITY ? 0.0f : peak;
    float total = 0.0f, value = 0.0f;
    for (int64_t p = first; p <= last; ++p) {
      if (call.owners[p] != user) continue;
      const int64_t own = p * call.columns + place;
      const float factor = expf(call.peaks[own] - shift);
      total += call.sums[own] * factor;
      value += call.parts[own * call.value_dim + dim] * factor;
    }
    const bool empty = total == 0.0f;
    narrow(empty ? 0.0f : value / total, static_cast<Number*>(call.job.out) + at);
    if (dim == 0) call.job.lse[at / call.value_dim] = empty ? -INFINITY : shift + logf(total);
  }
}

template <typename Number>
cudaError_t launch(const Call& call, cudaStream_t stream) {
  const auto attend_it = attend<Number>, combine_it = combine<Number>;
  const cudaError_t error = cudaFuncSetAttribute(
      attend_it, cudaFuncAttributeMaxDynamicSharedMemorySize, call.shape.bytes);
  if (error != cudaSuccess) return error;
  const int64_t work = call.pieces * call.tiles;
  LIVREC_LAUNCH(attend_it, work < kMostBlocks ? work : kMostBlocks, kThreads, call.shape.bytes,
                stream, call);
  const int64_t numbers = call.job.users * call.columns * call.value_dim;
  const int64_t blocks = (numbers + kThreads - 1) / kThreads;
  LIVREC_LAUNCH(combine_it, blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, 0, stream, call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t code_attention_cuda_space(const CodeAttentionCuda& job, int64_t* bytes) {
  Call call;
  const cudaError_t error = plan(job, 1, &call);
  if (error == cudaSuccess)
    *bytes = call.pieces * (8 + 4 * call.columns * (2 + static_cast<int64_t>(call.value_dim)));
  return error;
}

cudaError_t code_attention_cuda(const CodeAttentionCuda& job, void* space, cudaStream_t stream) {
  Call call;
  const cudaError_t error = plan(job, 1, &call);
  if (error != cudaSuccess || job.users == 0 || call.columns == 0) return error;
  call.owners = static_cast<int64_t*>(space);
  call.peaks = reinterpret_cast<float*>(call.owners + call.pieces);
  call.sums = call.peaks + call.pieces * call.columns;
  call.parts = call.sums + call.pieces * call.columns;
  return job.type == TableType::f32   ? launch<float>(call, stream)
         : job.type == TableType::f16 ? launch<__half>(call, stream)
                                      : launch<__nv_bfloat16>(call, stream);
}

}  // namespace livrec
