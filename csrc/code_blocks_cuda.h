// What the CUDA kernels of attention over codes share: how histories are cut, how a block is laid
// out in shared memory, products with table rows, and sums by row. See code_attention_cuda.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "code_attention_cuda.h"
#include "cuda_launch.h"

namespace livrec {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kTile = 4096;  // items times columns whose weights lie in shared memory at a time
constexpr int kBatch = 4;    // items that a lane adds at once
constexpr int kLines = 4;    // numbers that a block keeps of each column
constexpr int kMostColumns = 32, kMostLanes = 128;
constexpr int64_t kShortPiece = 1024, kLongPiece = 16384, kWantedBlocks = 256;
constexpr int64_t kMostBlocks = 1 << 30;

// How a block is laid out.
struct Shape {
  int rows;         // of all fields, with one of zeros for each field's unknown codes
  int column_bits;  // a block takes 2^column_bits columns
  int group_bits;   // 2^group_bits lanes of each column add a field's items, each their own
  int tables;       // of logits, and where there are 2 of slopes
  int bytes;        // of shared memory
  __host__ __device__ int columns() const { return 1 << column_bits; }
  __host__ __device__ int groups() const { return 1 << group_bits; }
  __host__ __device__ int lanes() const { return 1 << (column_bits + group_bits); }
  __host__ __device__ int room() const { return kTile >> column_bits; }  // items of a tile
};

// What all kernels know.
struct Call {
  CodeAttentionCuda job;
  Shape shape;
  const void* keys[kMostCodeFields];
  const void* values[kMostCodeFields];
  int starts[kMostCodeFields + 1];  // where a field's rows begin; the last of them is the unknown
  int fields, dim, value_dim, widest, thinnest;
  int64_t columns;       // candidates x heads of a user
  int64_t tiles;         // of columns
  int64_t pieces, size;  // at most `size` items each; see piece_at
  int64_t* owners;       // [pieces]: whose piece it is, or -1
  float *peaks, *sums;   // [pieces, columns]: the greatest logit, and the sum of terms
  float* parts;          // [pieces, columns, dims]: sums by row times table rows
};

// Four columns of a row.
struct alignas(16) Quad {
  float x[4];
};

template <typename Number>
struct alignas(4 * sizeof(Number)) Four {
  Number x[4];
};

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(float x, float* to) { *to = x; }
__device__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// Four numbers, zeros from `count` on. whole: rows begin where four can be read at once.
template <typename Number>
__device__ Quad read_four(const Number* from, int count, bool whole) {
  Quad quad;
  if (whole) {
    const Four<Number> four = *reinterpret_cast<const Four<Number>*>(from);
    for (int i = 0; i < 4; ++i) quad.x[i] = widen(four.x[i]);
  } else {
    for (int i = 0; i < 4; ++i) quad.x[i] = i < count ? widen(from[i]) : 0.0f;
  }
  return quad;
}

// Where a history begins, or the one before it ends.
__device__ int64_t bound_of(const Call& call, int64_t user) {
  const int64_t bound = call.job.offsets[user];
  return bound < 0 ? 0 : bound > call.job.items ? call.job.items : bound;
}

struct Piece {
  int64_t user, begin;
  int items;
};

// Pieces end where histories do and at multiples of `size`: item t of user u is in piece
// u + t / size, which is nobody else's. Some have no items.
__device__ Piece piece_at(const Call& call, int64_t index) {
  int64_t low = 0, high = call.job.users - 1;  // the last user whose first piece is not later
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (middle + bound_of(call, middle) / call.size <= index)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t start = (index - low) * call.size, own = bound_of(call, low);
  const int64_t begin = own > start ? own : start;
  const int64_t stop = bound_of(call, low + 1);
  const int64_t end = stop < start + call.size ? stop : start + call.size;
  return {low, begin, end > begin ? static_cast<int>(end - begin) : 0};
}

// A block's work, and where things lie in its shared memory.
struct Block {
  int64_t user, begin;
  int items;
  int64_t piece, first;  // column
  int quads;             // of columns
  int quad;              // of this thread, which takes every stride-th row or item from `place` on
  int place, stride;
  int heads[4];     // of the quad's columns
  Quad* logits;     // [rows, columns]: of rows; at last, the sums of all lanes
  Quad* slopes;     // [rows, columns]: likewise, if there are two tables
  float* sums;      // [rows, lanes]
  Quad* scratch;    // queries [dims, columns]; weights [items, columns]; what threads add up
  Quad* peaks;      // [columns]: greatest logits; and then, [kLines - 1, columns], other lines
  uint16_t* named;  // [fields, kTile / columns]: rows of the items that weights are of
};

// Numbers of `scratch`.
__host__ __device__ int scratch_of(int columns, int dim) {
  const int queries = columns * ((dim + 3) / 4 * 4);
  return queries > kTile ? queries : kTile;
}

__device__ int64_t place_of(const Call& call, int64_t column) {  // in [candidates, heads]
  return column % call.job.candidates * call.job.heads + column / call.job.candidates;
}

__device__ Block block_of(const Call& call, const Piece& piece, int64_t index, int64_t tile,
                          Quad* memory) {
  const Shape& shape = call.shape;
  Block block;
  block.user = piece.user, block.begin = piece.begin, block.items = piece.items;
  block.piece = index, block.first = tile * shape.columns();
  block.quads = shape.columns() / 4;
  const int thread = static_cast<int>(threadIdx.x);
  block.quad = thread % block.quads, block.place = thread / block.quads;
  block.stride = kThreads / block.quads;
  for (int c = 0; c < 4; ++c) {
    const int64_t column = block.first + 4 * block.quad + c;
    const int64_t last = call.columns - 1;
    block.heads[c] = static_cast<int>((column < last ? column : last) / call.job.candidates);
  }
  block.logits = memory;
  block.slopes = memory + shape.rows * block.quads;
  block.sums = reinterpret_cast<float*>(memory + shape.tables * shape.rows * block.quads);
  block.scratch = reinterpret_cast<Quad*>(block.sums + shape.rows * shape.lanes());
  block.peaks = block.scratch + scratch_of(shape.columns(), call.widest) / 4;
  block.named = reinterpret_cast<uint16_t*>(block.peaks + kLines * block.quads);
  return block;
}

// Queries, or gradients, of the block's columns: x [users, candidates, heads, dims].
template <typename Number>
__device__ void put_queries(const Call& call, const Block& block, const void* x, int dims) {
  auto* queries = reinterpret_cast<float*>(block.scratch);
  const auto* own = static_cast<const Number*>(x) + block.user * call.columns * dims;
  const int bits = call.shape.column_bits, count = ((dims + 3) / 4 * 4) << bits;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int dim = i >> bits;
    const int64_t column = block.first + (i & ((1 << bits) - 1));
    const bool there = dim < dims && column < call.columns;
    queries[i] = there ? widen(own[place_of(call, column) * dims + dim]) : 0.0f;
  }
}

// A row of its field's table; null for an unknown code's.
template <typename Number>
__device__ const Number* table_row(const Call& call, const void* const* tables, int dims, int row) {
  int field = 0;
  while (field + 1 < call.fields && row >= call.starts[field + 1]) ++field;
  if (row >= call.starts[field + 1] - 1) return nullptr;
  const int64_t own = row - call.starts[field];
  return static_cast<const Number*>(tables[field]) + own * call.job.heads * dims;
}

// Products of all rows with the queries. A thread takes two rows at a time, so that a query is read
// once for both.
template <typename Number>
__device__ void put_products(const Call& call, const Block& block, const void* const* tables,
                             int dims, float scale, Quad* out) {
  const int rows = call.shape.rows, half = (rows + 1) / 2;
  const bool whole = dims % 4 == 0;
  for (int row = block.place; row < half; row += block.stride) {
    const Number* from[2] = {table_row<Number>(call, tables, dims, row),
                             table_row<Number>(call, tables, dims, row + half)};
    Quad sums[2] = {};
    for (int dim = 0; dim < dims; dim += 4) {
      Quad queries[4];
      for (int i = 0; i < 4; ++i) queries[i] = block.scratch[(dim + i) * block.quads + block.quad];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!from[j]) continue;
        Quad own;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (c == 0 || block.heads[c] != block.heads[c - 1])
            own = read_four(from[j] + block.heads[c] * dims + dim, dims - dim, whole);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[j].x[c] += own.x[i] * queries[i].x[c];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      for (int c = 0; c < 4; ++c) sums[j].x[c] *= scale;
      if (row + j * half < rows) out[(row + j * half) * block.quads + block.quad] = sums[j];
    }
  }
}

// The logits of all rows, and, given the gradient of the results, their slopes, once all threads
// have come here again. One loop: products are long.
template <typename Number>
__device__ void put_tables(const Call& call, const Block& block, const void* grad) {
#pragma unroll 1
  for (int sloping = 0; sloping < (grad ? 2 : 1); ++sloping) {
    const int dims = sloping ? call.value_dim : call.dim;
    put_queries<Number>(call, block, sloping ? grad : call.job.q, dims);
    __syncthreads();
    put_products<Number>(call, block, sloping ? call.values : call.keys, dims,
                         sloping ? 1.0f : call.job.scale, sloping ? block.slopes : block.logits);
    __syncthreads();
  }
}

__device__ int row_of(const Call& call, int64_t item, int field) {
  const int64_t at = item * call.fields + field;
  const int code =
      call.job.code_type == CodeType::u8    ? static_cast<const uint8_t*>(call.job.codes)[at]
      : call.job.code_type == CodeType::i16 ? static_cast<const int16_t*>(call.job.codes)[at]
                                            : static_cast<const int32_t*>(call.job.codes)[at];
  const int start = call.starts[field], unknown = call.starts[field + 1] - 1;
  return code >= 0 && code < unknown - start ? start + code : unknown;
}

// The sum of an item's rows of `table`; rows, if given, gets their numbers, `stride` apart.
__device__ Quad total_of(const Call& call, const Block& block, const Quad* table, int item,
                         uint16_t* rows = nullptr, int stride = 0) {
  Quad total = {};
#pragma unroll 4
  for (int f = 0; f < call.fields; ++f) {
    const int row = row_of(call, block.begin + item, f);
    const Quad own = table[row * block.quads + block.quad];
    for (int c = 0; c < 4; ++c) total.x[c] += own.x[c];
    if (rows) rows[f * stride] = static_cast<uint16_t>(row);
  }
  return total;
}

__device__ Quad logits_of(const Call& call, const Block& block, int item, uint16_t* rows = nullptr,
                          int stride = 0) {
  Quad total = total_of(call, block, block.logits, item, rows, stride);
  if (call.job.bias) {
    const float* bias = call.job.bias + (block.begin + item) * call.job.bias_heads;
    for (int c = 0; c < 4; ++c) total.x[c] += bias[call.job.bias_heads > 1 ? block.heads[c] : 0];
  }
  return total;
}

// The greatest logits of the piece, 0 where all are -inf.
__device__ void put_peaks(const Call& call, const Block& block) {
  Quad peak;
  for (int c = 0; c < 4; ++c) peak.x[c] = -INFINITY;
  for (int item = block.place; item < block.items; item += block.stride) {
    const Quad own = logits_of(call, block, item);
    for (int c = 0; c < 4; ++c) peak.x[c] = fmaxf(peak.x[c], own.x[c]);
  }
  block.scratch[threadIdx.x] = peak;
  __syncthreads();
  if (block.place == 0) {
    for (int i = 1; i < block.stride; ++i) {
      const Quad own = block.scratch[i * block.quads + block.quad];
      for (int c = 0; c < 4; ++c) peak.x[c] = fmaxf(peak.x[c], own.x[c]);
    }
    for (int c = 0; c < 4; ++c)
      if (peak.x[c] == -INFINITY) peak.x[c] = 0.0f;
    block.peaks[block.quad] = peak;
  }
  __syncthreads();
}

// weigh(item, rows, stride) of the items [first, first + count), which puts their rows, too: for a
// field, the items of a lane one after the other. Items up to `padded` weigh nothing.
template <typename Weigh>
__device__ void put_weights(const Call& call, const Block& block, int first, int count, int padded,
                            const Weigh& weigh) {
  const int room = call.shape.room(), groups = call.shape.groups(), bits = call.shape.group_bits;
  for (int item = block.place; item < padded; item += block.stride) {
    uint16_t* rows = block.named + (item & (groups - 1)) * (room >> bits) + (item >> bits);
    Quad weight = {};
    if (item < count) {
      weight = weigh(first + item, block.quad ? nullptr : rows, room);
    } else if (block.quad == 0) {
      for (int f = 0; f < call.fields; ++f)
        rows[f * room] = static_cast<uint16_t>(call.starts[f + 1] - 1);
    }
    block.scratch[item * block.quads + block.quad] = weight;
  }
}

// Rows and weights of four items of a lane.
struct Batch {
  int at[kBatch];  // where the row's sums lie
  float weight[kBatch];
};

__device__ Batch batch_at(const uint16_t* rows, const float* weights, int step, int lanes) {
  const Four<uint16_t> own = *reinterpret_cast<const Four<uint16_t>*>(rows + step);
  Batch batch;
  for (int i = 0; i < kBatch; ++i) {
    batch.at[i] = own.x[i] * lanes;
    batch.weight[i] = weights[(step + i) * lanes];
  }
  return batch;
}

// Adds the weights of `padded` items to the sums of their rows.
__device__ void add_weights(const Call& call, const Block& block, int padded) {
  const int lanes = call.shape.lanes(), warps = lanes > kWarp ? lanes / kWarp : 1;
  const int room = call.shape.room(), steps = padded >> call.shape.group_bits;
  const int own = threadIdx.x % kWarp;
  for (int unit = threadIdx.x / kWarp; unit < call.fields * warps; unit += kThreads / kWarp) {
    const int lane = unit % warps * kWarp + own;
    if (lane >= lanes) continue;
    const int group = lane >> call.shape.column_bits;
    const uint16_t* rows =
        block.named + unit / warps * room + group * (room >> call.shape.group_bits);
    const float* weights = reinterpret_cast<const float*>(block.scratch) + lane;
    float* sums = block.sums + lane;
    Batch next = batch_at(rows, weights, 0, lanes);
    for (int step = 0; step < steps; step += kBatch) {
      const Batch now = next;
      if (step + kBatch < steps) next = batch_at(rows, weights, step + kBatch, lanes);
      float sum[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum[i] = sums[now.at[i]];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < i; ++j)
          if (now.at[j] == now.at[i]) sum[i] = sum[j];
        sum[i] += now.weight[i];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sums[now.at[i]] = sum[i];  // the last one stays
    }
  }
}

// The sums of all lanes of a column, into `logits`. Each row begins with another group of lanes:
// threads side by side meet in no bank.
__device__ void fold(const Call& call, const Block& block) {
  const int bits = call.shape.column_bits, groups = call.shape.groups();
  auto* totals = reinterpret_cast<float*>(block.logits);
  for (int i = threadIdx.x; i < call.shape.rows << bits; i += kThreads) {
    const int row = i >> bits, column = i - (row << bits);
    float total = 0.0f;
    for (int g = 0; g < groups; ++g)
      total += block.sums[row * call.shape.lanes() + (((g + row) & (groups - 1)) << bits) + column];
    totals[i] = total;
  }
}

// The weights of all items, added up by row, in `logits`: [rows, columns]. visit(first, count) sees
// the weights of some items in `scratch`.
template <typename Weigh, typename Visit>
__device__ void add_items(const Call& call, const Block& block, const Weigh& weigh,
                          const Visit& visit) {
  const int sums = call.shape.rows * call.shape.lanes();
  for (int i = threadIdx.x; i < sums; i += kThreads) block.sums[i] = 0.0f;
  const int room = call.shape.room(), step = call.shape.groups() * kBatch;
  for (int first = 0; first < block.items; first += room) {
    const int count = block.items - first < room ? block.items - first : room;
    const int padded = (count + step - 1) & -step;
    put_weights(call, block, first, count, padded, weigh);
    __syncthreads();
    add_weights(call, block, padded);
    visit(first, count);
    __syncthreads();
  }
  fold(call, block);
  __syncthreads();
}

// Writes the products of the sums with table rows, times `factor`. A thread takes four columns, a
// dimension, and every teams-th row of each field; the teams are added in order.
template <typename Number>
__device__ void write_parts(const Call& call, const Block& block, const void* const* tables,
                            int dims, float factor) {
  const int units = block.quads * dims, teams = units < kThreads ? kThreads / units : 1;
  const int team = static_cast<int>(threadIdx.x) / units;  // 0 where units are many
  for (int base = 0; base < units; base += kThreads) {
    const int unit = base + static_cast<int>(threadIdx.x) - team * units;
    const bool works = unit < units && team < teams;
    const int quad = unit / dims, dim = unit % dims;
    int64_t heads[4];
    Quad total = {};
    for (int c = 0; c < 4; ++c) {
      const int64_t column = block.first + 4 * quad + c, last = call.columns - 1;
      heads[c] = (column < last ? column : last) / call.job.candidates;
    }
    for (int f = 0; works && f < call.fields; ++f) {
      const int rows = call.starts[f + 1] - 1 - call.starts[f];
      const auto* rows_at = static_cast<const Number*>(tables[f]) + dim;
#pragma unroll 4
      for (int row = team; row < rows; row += teams) {
        const Quad own = block.logits[(call.starts[f] + row) * block.quads + quad];
        float number = 0.0f;
        for (int c = 0; c < 4; ++c) {
          if (c == 0 || heads[c] != heads[c - 1])
            number = widen(rows_at[(row * call.job.heads + heads[c]) * dims]);
          total.x[c] += own.x[c] * number;
        }
      }
    }
    __syncthreads();
    block.scratch[threadIdx.x] = total;
    __syncthreads();
    if (!works || team > 0) continue;
    for (int i = 1; i < teams; ++i)
      for (int c = 0; c < 4; ++c) total.x[c] += block.scratch[i * units + unit].x[c];
    for (int c = 0; c < 4; ++c) {
      const int64_t column = block.first + 4 * quad + c;
      if (column >= call.columns) continue;
      const int64_t at = block.piece * call.columns + place_of(call, column);
      call.parts[at * dims + dim] = total.x[c] * factor;
    }
  }
}

int bytes_of(const Shape& shape, int fields, int dim) {
  const int floats = shape.rows * (shape.tables * shape.columns() + shape.lanes()) +
                     scratch_of(shape.columns(), dim) + kLines * shape.columns();
  return 4 * floats + 2 * fields * shape.room();
}

// The widest tile of columns that leaves room for a warp's lanes, or for fewer where tables are
// large; then as many lanes as leave room for a second block on an SM, while they have items.
Shape shape_of(int rows, int tables, int64_t columns, int fields, int dim, int limit) {
  const auto fits = [&](Shape& shape, int most) {
    shape.bytes = bytes_of(shape, fields, dim);
    return shape.bytes <= most;
  };
  Shape shape{rows, 2, 0, tables, 0};
  while (shape.columns() < columns && shape.columns() < kMostColumns) ++shape.column_bits;
  while (shape.lanes() < kWarp) ++shape.group_bits;
  while (!fits(shape, limit) && shape.columns() > 4) --shape.column_bits, ++shape.group_bits;
  while (!fits(shape, limit) && shape.groups() > 1) --shape.group_bits;
  for (Shape more = shape; shape.lanes() >= kWarp && shape.lanes() < kMostLanes; shape = more) {
    ++more.group_bits;
    if (!fits(more, limit / 2 - 512)) break;
  }
  return shape;
}

// Fills all of `call` but what lies in the workspace, for the current device.
cudaError_t plan(const CodeAttentionCuda& job, int tables, Call* call) {
  const bool limited = job.fields >= 1 && job.fields <= kMostCodeFields && job.dim >= 1 &&
                       job.dim <= kMostCodeDim && job.value_dim >= 1 &&
                       job.value_dim <= kMostCodeDim;
  if (!limited) return cudaErrorInvalidValue;
  call->job = job;
  call->fields = static_cast<int>(job.fields);
  call->dim = static_cast<int>(job.dim), call->value_dim = static_cast<int>(job.value_dim);
  call->widest = tables == 1 || job.dim > job.value_dim ? call->dim : call->value_dim;
  call->columns = job.candidates * job.heads;
  call->starts[0] = call->thinnest = 0;
  for (int f = 0; f < call->fields; ++f) {
    if (job.rows[f] < 1 || job.rows[f] >= kMostCodeRows - call->starts[f])
      return cudaErrorInvalidValue;
    call->keys[f] = job.keys[f], call->values[f] = job.values[f];
    call->starts[f + 1] = call->starts[f] + static_cast<int>(job.rows[f]) + 1;
    if (job.rows[f] < job.rows[call->thinnest]) call->thinnest = f;
  }
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  call->shape = shape_of(call->starts[call->fields], tables, call->columns, call->fields,
                         call->widest, limit);
  if (call->shape.bytes > limit) return cudaErrorInvalidValue;
  call->tiles = (call->columns + call->shape.columns() - 1) / call->shape.columns();
  call->size = kShortPiece;
  const int64_t blocks_each = tables == 1 ? call->tiles : 1;
  while (call->size < kLongPiece && call->size * kWantedBlocks < job.items * blocks_each)
    call->size *= 2;
  call->pieces = job.users + job.items / call->size;
  return cudaSuccess;
}

}  // namespace
}  // namespace livrec
