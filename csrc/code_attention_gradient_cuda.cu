#include "code_attention_gradient_cuda.h"

#include "code_blocks_cuda.h"

namespace livrec {
namespace {

constexpr int kRowsAtOnce = 4;

struct Slopes {
  CodeAttentionGradientCuda job;
  float* excesses;  // [pieces, columns]: sums of terms times D
  // Of each column of a user, [users, columns]: <grad, out>, m, 1 / Z, and d less grad_lse.
  float *bases, *tops, *inverses, *means;
  int* marks;            // [rows]: whether an item names it
  float* sums;           // [pieces at a time, 2, rows, width]: P and dS by row
  int64_t width;         // columns of all tiles
  int64_t first, count;  // pieces
};

// Kernels without blocks of their own go through their work with whatever threads there are.
__device__ int64_t first_of_thread() {
  return blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
}
__device__ int64_t all_threads() { return gridDim.x * static_cast<int64_t>(kThreads); }

__global__ void __launch_bounds__(kThreads)
    clear(const __grid_constant__ Call call, const __grid_constant__ Slopes slopes) {
  const int64_t numbers = call.job.bias ? call.job.items * call.job.bias_heads : 0;
  for (int64_t i = first_of_thread(); i < numbers; i += all_threads())
    slopes.job.grad_bias[i] = 0.0f;
  for (int64_t i = first_of_thread(); i < call.shape.rows; i += all_threads()) slopes.marks[i] = 0;
}

// Marks the rows that items name. All write the same.
__global__ void __launch_bounds__(kThreads)
    mark(const __grid_constant__ Call call, const __grid_constant__ Slopes slopes) {
  const int64_t from = bound_of(call, 0), to = bound_of(call, call.job.users);
  for (int64_t i = from + first_of_thread(); i < to; i += all_threads())
    for (int f = 0; f < call.fields; ++f) slopes.marks[row_of(call, i, f)] = 1;
}

// Lists a field's marked rows; a block takes a field, a thread some rows one after the other.
__global__ void __launch_bounds__(kThreads)
    list(const __grid_constant__ Call call, const __grid_constant__ Slopes slopes) {
  LIVREC_SHARED(int, counts);
  for (int f = blockIdx.x; f < call.fields; f += gridDim.x) {
    const int count = call.starts[f + 1] - 1 - call.starts[f];
    const int each = (count + kThreads - 1) / kThreads, thread = static_cast<int>(threadIdx.x);
    const int begin = thread * each < count ? thread * each : count;
    const int end = begin + each < count ? begin + each : count;
    const int* marks = slopes.marks + call.starts[f];
    int own = 0;
    for (int row = begin; row < end; ++row) own += marks[row];
    counts[thread] = own;
    __syncthreads();
    int at = 0;
    for (int i = 0; i < thread; ++i) at += counts[i];
    if (thread == kThreads - 1) slopes.job.counts[f] = at + own;
    int64_t* rows = slopes.job.rows + call.starts[f] - f;
    for (int row = begin; row < end; ++row)
      if (marks[row]) rows[at++] = row;
    __syncthreads();
  }
}

// <grad, out>; 0 where it is not finite.
template <typename Number>
__global__ void __launch_bounds__(kThreads)
    put_bases(const __grid_constant__ Call call, const __grid_constant__ Slopes slopes) {
  for (int64_t i = first_of_thread(); i < call.job.users * call.columns; i += all_threads()) {
    const auto* grad = static_cast<const Number*>(slopes.job.grad) + i * call.value_dim;
    const auto* out = static_cast<const Number*>(slopes.job.out) + i * call.value_dim;
    float sum = 0.0f;
    for (int d = 0; d < call.value_dim; ++d) sum += widen(grad[d]) * widen(out[d]);
    slopes.bases[i] = fabsf(sum) < INFINITY ? sum : 0.0f;
  }
}

// A number of each of the quad's columns, of `from` [users, columns]; 0 beyond the last column.
__device__ Quad line_of(const Call& call, const Block& block, const float* from) {
  Quad line;
  for (int c = 0; c < 4; ++c) {
    const int64_t column = block.first + 4 * block.quad + c;
    line.x[c] =
        column < call.columns ? from[block.user * call.columns + place_of(call, column)] : 0.0f;
  }
  return line;
}

// Writes what all threads have of each column, [pieces, columns], added in order.
__device__ void write_line(const Call& call, const Block& block, Quad own, float* to) {
  __syncthreads();
  block.scratch[threadIdx.x] = own;
  __syncthreads();
  if (block.place > 0) return;
  for (int i = 1; i < block.stride; ++i)
    for (int c = 0; c < 4; ++c) own.x[c] += block.scratch[i * block.quads + block.quad].x[c];
  for (int c = 0; c < 4; ++c) {
    const int64_t column = block.first + 4 * block.quad + c;
    if (column < call.columns) to[block.piece * call.columns + place_of(call, column)] = own.x[c];
  }
}

// The greatest logits of a piece, the sums of its terms, and of those times D.
template <typename Number>
__global__ void __launch_bounds__(kThreads, 2)
    measure(const __grid_constant__ Call call, const __grid_constant__ Slopes slopes) {
  LIVREC_SHARED(Quad, memory);
  for (int64_t work = blockIdx.x; work < call.pieces * call.tiles; work += gridDim.x) {
    const int64_t index = work / call.tiles, tile = work % call.tiles;
    const Piece piece = piece_at(call, index);
    if (tile == 0 && threadIdx.x == 0) call.owners[index] = piece.items ? piece.user : -1;
    if (piece.items == 0) continue;
    const Block block = block_of(call, piece, index, tile, memory);
    put_tables<Number>(call, block, slopes.job.grad);
    put_peaks(call, block);
    const Quad peak = block.peaks[block.quad], base = line_of(call, block, slopes.bases);
    Quad total = {}, excess = {};
    for (int item = block.place; item < block.items; item += block.stride) {
      const Quad logit = logits_of(call, block, item);
      const Quad slope = total_of(call, block, block.slopes, item);
      for (int c = 0; c < 4; ++c) {
        const float term = expf(logit.x[c] - peak.x[c]);
        total.x[c] += term;
        excess.x[c] += term * (slope.x[c] - base.x[c]);
      }
    }
    write_line(call, block, total, call.sums);
    write_line(call, block, excess, slopes.excesses);
    if (block.place == 0) {
      for (int c = 0; c < 4; ++c) {
        const int64_t column = block.first + 4 * block.quad + c;
        if (column >= call.columns) continue;
        const int64_t at = block.piece * call.columns + place_of(call, column);
        call.peaks[at] = call.sums[at] == 0.0f ? -INFINITY : peak.x[c];
      }
    }
    __syncthreads();
  }
}

struct Pieces {
  int64_t first, last;
};

__device__ Pieces pieces_of(const Call& call, int64_t user) {
  const int64_t begin = bound_of(call, user), end = bound_of(call, user + 1);
  const int64_t first = user + begin / call.size;
  return {first, end > begin ? user + (end - 1) / call.size : first - 1};
}

// Puts the pieces of a history together.
__global__ void __launch_bounds__(kThreads)
    settle(const __grid_constant__ Call call, const __grid_constant__ Slopes slopes) {
  for (int64_t i = first_of_thread(); i < call.job.users * call.columns; i += all_threads()) {
    const int64_t user = i / call.columns, place = i % call.columns;
    const Pieces own = pieces_of(call, user);
    float peak = -INFINITY, total = 0.0f, excess = 0.0f;
    for (int64_t p = own.first; p <= own.last; ++p)
      if (call.owners[p] == user) peak = fmaxf(peak, call.peaks[p * call.columns + place]);
    const float shift = peak == -INFINITY ? 0.0f : peak;
    for (int64_t p = own.first; p <= own.last; ++p) {
      if (call.owners[p] != user) continue;
      const float factor = expf(call.peaks[p * call.columns + place] - shift);
      total += call.sums[p * call.columns + place] * factor;
      excess += slopes.excesses[p * call.columns + place] * factor;
    }
    const bool empty = total == 0.0f;  // and a gradient of lse = -inf may be infinite
    const float lse = slopes.job.grad_lse ? slopes.job.grad_lse[i] : 0.0f;
    slopes.tops[i] = shift;
    slopes.inverses[i] = empty ? 0.0f : 1.0f / total;
    slopes.means[i] = empty ? 0.0f : excess / total - lse;
  }
}

// Adds the slopes of items to the gradient of the bias; a thread takes an item and a head.
__device__ void add_bias(const Call& call, const Block& block, const Slopes& slopes, int first,
                         int count) {
  const int heads = static_cast<int>(call.job.bias_heads), columns = call.shape.columns();
  const auto* weights = reinterpret_cast<const float*>(block.scratch);
  for (int i = threadIdx.x; i < count * heads; i += kThreads) {
    const int item = i / heads, head = i % heads;
    float sum = 0.0f;
    for (int c = 0; c < columns && block.first + c < call.columns; ++c)
      if (heads == 1 || (block.first + c) / call.job.candidates == head)
        sum += weights[item * columns + c];
    slopes.job.grad_bias[(block.begin + first + item) * heads + head] += sum;
  }
}

// Weights, or the gradients of logits, of a piece: by row into `sums`; of the latter also their
// products with keys, and the gradient of the bias. A block goes through the tiles of columns.
template <typename Number>
__global__ void __launch_bounds__(kThreads, 2)
    spread(const __grid_constant__ Call call, const __grid_constant__ Slopes slopes) {
  LIVREC_SHARED(Quad, memory);
  for (int64_t work = blockIdx.x; work < slopes.count * 2; work += gridDim.x) {
    const int64_t index = slopes.first + work / 2, sloping = work % 2;
    const Piece piece = piece_at(call, index);
    for (int64_t tile = 0; piece.items && tile < call.tiles; ++tile) {
      const Block block = block_of(call, piece, index, tile, memory);
      put_tables<Number>(call, block, sloping ? slopes.job.grad : nullptr);
      const Quad top = line_of(call, block, slopes.tops);
      const Quad inverse = line_of(call, block, slopes.inverses);
      const Quad base = line_of(call, block, slopes.bases);
      const Quad mean = line_of(call, block, slopes.means);
      const auto weigh = [&](int item, uint16_t* rows, int stride) {
        Quad own = logits_of(call, block, item, rows, stride);
        for (int c = 0; c < 4; ++c) own.x[c] = expf(own.x[c] - top.x[c]) * inverse.x[c];
        if (sloping) {
          const Quad slope = total_of(call, block, block.slopes, item);
          for (int c = 0; c < 4; ++c) own.x[c] *= slope.x[c] - base.x[c] - mean.x[c];
        }
        return own;
      };
      add_items(call, block, weigh, [&](int first, int count) {
        if (sloping && call.job.bias) add_bias(call, block, slopes, first, count);
      });
      const int rows = call.shape.rows, bits = call.shape.column_bits;
      const auto* totals = reinterpret_cast<const float*>(block.logits);
      float* to = slopes.sums + work * rows * slopes.width + block.first;
      for (int i = threadIdx.x; i < rows << bits; i += kThreads)
        to[(i >> bits) * slopes.width + (i & ((1 << bits) - 1))] = totals[i];
      if (sloping) write_parts<Number>(call, block, call.keys, call.dim, call.job.scale);
      __syncthreads();
    }
  }
}

// The gradients of table rows: adds up the pieces that have been spread, in order. A thread takes a
// number of four rows.
template <typename Number>
__device__ void gather_rows(const Call& call, const Slopes& slopes, int sloping, const void* x,
                            int dims, float factor, float* out) {
  const int64_t heads = call.job.heads, each = heads * dims;
  const int groups = (call.shape.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int64_t i = first_of_thread(); i < groups * each; i += all_threads()) {
    const int row = static_cast<int>(i / each) * kRowsAtOnce;
    const int64_t place = i % each, head = place / dims;
    float totals[kRowsAtOnce] = {};
    for (int64_t piece = 0; piece < slopes.count; ++piece) {
      const int64_t user = call.owners[slopes.first + piece];
      if (user < 0) continue;
      const auto* own = static_cast<const Number*>(x) + user * call.job.candidates * each + place;
      const float* sums = slopes.sums +
                          ((piece * 2 + sloping) * call.shape.rows + row) * slopes.width +
                          head * call.job.candidates;
#pragma unroll 2
      for (int64_t c = 0; c < call.job.candidates; ++c) {
        const float number = widen(own[c * each]);
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j)
          if (row + j < call.shape.rows) totals[j] += sums[j * slopes.width + c] * number;
      }
    }
    int field = 0;
    for (int j = 0; j < kRowsAtOnce && row + j < call.shape.rows; ++j) {
      while (row + j >= call.starts[field + 1]) ++field;
      if (row + j == call.starts[field + 1] - 1) continue;  // unknown codes
      float* to = out + (row + j - field) * each + place;
      *to = (slopes.first == 0 ? 0.0f : *to) + factor * totals[j];
    }
  }
}

template <typename Number>
__global__ void __launch_bounds__(kThreads)
    gather(const __grid_constant__ Call call, const __grid_constant__ Slopes slopes) {
  gather_rows<Number>(call, slopes, 0, slopes.job.grad, call.value_dim, 1.0f,
                      slopes.job.value_sums);
  gather_rows<Number>(call, slopes, 1, call.job.q, call.dim, call.job.scale, slopes.job.key_sums);
}

// The gradient of q, piece by piece.
template <typename Number>
__global__ void __launch_bounds__(kThreads)
    finish(const __grid_constant__ Call call, const __grid_constant__ Slopes slopes) {
  const int64_t each = call.columns * call.dim;
  for (int64_t i = first_of_thread(); i < call.job.users * each; i += all_threads()) {
    const int64_t user = i / each;
    const Pieces own = pieces_of(call, user);
    float total = 0.0f;
    for (int64_t p = own.first; p <= own.last; ++p)
      if (call.owners[p] == user) total += call.parts[p * each + i % each];
    narrow(total, static_cast<Number*>(slopes.job.grad_q) + i);
  }
}

__global__ void __launch_bounds__(kThreads)
    take(const float* from, const int64_t* rows, int64_t count, int64_t size, float* to) {
  for (int64_t i = first_of_thread(); i < count * size; i += all_threads())
    to[i] = from[rows[i / size] * size + i % size];
}

int64_t blocks_for(int64_t numbers) {
  const int64_t blocks = (numbers + kThreads - 1) / kThreads;
  return blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks;
}

template <typename Number>
cudaError_t launch(const Call& call, Slopes slopes, cudaStream_t stream) {
  const auto bases_it = put_bases<Number>, measure_it = measure<Number>, spread_it = spread<Number>;
  const auto gather_it = gather<Number>, finish_it = finish<Number>;
  const int bytes = call.shape.bytes;
  for (const auto kernel : {measure_it, spread_it}) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  const int64_t numbers = call.job.users * call.columns, items = call.job.items;
  const int64_t rows = call.shape.rows * call.job.heads * (call.dim + call.value_dim);
  const int64_t works = call.pieces * call.tiles, room = slopes.count;
  LIVREC_LAUNCH(clear, blocks_for(items), kThreads, 0, stream, call, slopes);
  LIVREC_LAUNCH(mark, blocks_for(items), kThreads, 0, stream, call, slopes);
  LIVREC_LAUNCH(list, call.fields, kThreads, kThreads * 4, stream, call, slopes);
  if (numbers) {
    LIVREC_LAUNCH(bases_it, blocks_for(numbers), kThreads, 0, stream, call, slopes);
    LIVREC_LAUNCH(measure_it, works < kMostBlocks ? works : kMostBlocks, kThreads, bytes, stream,
                  call, slopes);
    LIVREC_LAUNCH(settle, blocks_for(numbers), kThreads, 0, stream, call, slopes);
  }
  const int64_t pieces = numbers ? call.pieces : 0;
  slopes.first = 0;
  do {
    slopes.count = pieces - slopes.first < room ? pieces - slopes.first : room;
    if (slopes.count)
      LIVREC_LAUNCH(spread_it, slopes.count * 2, kThreads, bytes, stream, call, slopes);
    LIVREC_LAUNCH(gather_it, blocks_for(rows), kThreads, 0, stream, call, slopes);
    slopes.first += room;
  } while (slopes.first < pieces);
  LIVREC_LAUNCH(finish_it, blocks_for(numbers * call.dim), kThreads, 0, stream, call, slopes);
  return cudaGetLastError();
}

// Cuts `space` into what both structs have there, in numbers of 4 bytes; or only counts them.
int64_t put_space(Call* call, Slopes* slopes, void* space) {
  const int64_t numbers = call->pieces * call->columns, users = call->job.users * call->columns;
  int64_t used = 0;
  const auto next = [&](int64_t count) {
    float* at = static_cast<float*>(space) + (space ? used : 0);
    used += count;
    return at;
  };
  call->owners = reinterpret_cast<int64_t*>(next(2 * call->pieces));
  call->peaks = next(numbers), call->sums = next(numbers);
  slopes->excesses = next(numbers);
  call->parts = next(numbers * call->dim);
  slopes->bases = next(users), slopes->tops = next(users);
  slopes->inverses = next(users), slopes->means = next(users);
  slopes->marks = reinterpret_cast<int*>(next(call->shape.rows));
  slopes->width = call->tiles << call->shape.column_bits;
  const int64_t each = 2 * call->shape.rows * slopes->width;
  slopes->count = each ? slopes->job.room / 4 / each : 0;
  if (slopes->count < 1) slopes->count = 1;
  if (slopes->count > call->pieces) slopes->count = call->pieces;
  slopes->sums = next(slopes->count * each);
  return used;
}

cudaError_t plan_gradient(const CodeAttentionGradientCuda& job, Call* call, Slopes* slopes) {
  const cudaError_t error = plan(job.attention, 2, call);
  slopes->job = job;
  return error != cudaSuccess                                 ? error
         : call->starts[call->fields] > kMostCodeGradientRows ? cudaErrorInvalidValue
                                                              : cudaSuccess;
}

}  // namespace

cudaError_t code_attention_gradient_cuda_space(const CodeAttentionGradientCuda& job,
                                               int64_t* bytes) {
  Call call;
  Slopes slopes;
  const cudaError_t error = plan_gradient(job, &call, &slopes);
  if (error == cudaSuccess) *bytes = 4 * put_space(&call, &slopes, nullptr);
  return error;
}

cudaError_t code_attention_gradient_cuda(const CodeAttentionGradientCuda& job, void* space,
                                         cudaStream_t stream) {
  Call call;
  Slopes slopes;
  const cudaError_t error = plan_gradient(job, &call, &slopes);
  if (error != cudaSuccess) return error;
  put_space(&call, &slopes, space);
  return job.attention.type == TableType::f32   ? launch<float>(call, slopes, stream)
         : job.attention.type == TableType::f16 ? launch<__half>(call, slopes, stream)
                                                : launch<__nv_bfloat16>(call, slopes, stream);
}

cudaError_t code_take_rows_cuda(const float* from, const int64_t* rows, int64_t count, int64_t size,
                                float* to, cudaStream_t stream) {
  if (count * size == 0) return cudaSuccess;
  LIVREC_LAUNCH(take, blocks_for(count * size), kThreads, 0, stream, from, rows, count, size, to);
  return cudaGetLastError();
}

}  // namespace livrec
