// Backward pass of cosine attention.
//
// With P = exp(z - lse) and dz_ij = P_ij (dout_i.v_j - delta_i), delta_i = dout_i.out_i:
//
//     dv_j = sum_i P_ij dout_i              dk^_j = s sum_i dz_ij q^_i           dbias = dz
//     dq^_i = s sum_j dz_ij k^_j            t_i = q^_i.dq^_i
//     dq_i = (dq^_i - q^_i t_i) / |q_i|     the same for k          dlog_scale = sum_i t_i
//
// A gradient of lse itself adds P_ij dlse_i to dz_ij: it is taken from delta_i.
//
// The gradient of the scale falls out of the projection of dq. Nothing needs a maximum: lse is exact.
//
// Products are taken transposed (keys by rows): a warp owns 16 keys of a tile, so its accumulators
// are at once the left operands of dv and dk, which it completes alone. dz passes through shared
// memory for dq only. Three passes use the same code:
//
//   both      at most 64 query rows, which stay in the block while keys stream by: dq, dk, dv with
//             each key read once; the splits of the keys add their dq in a second kernel
//   queries   a tile of rows, all keys: dq
//   keys      a tile of keys, all rows that see it: dk, dv
//
// No atomics anywhere. dbias: a block adds what it finds in its batches to its own partial sum.
#pragma once
#include "cosine_attention_gradients.cuh"

namespace cosine {
// Keys that no row of the block sees have no gradient
template <class T>
__device__ __forceinline__ void store_zeros(const Problem& p, const Unit& unit, Range tiles) {
    const MmtrainStrides strides = contiguous(p, p.keys);
    const int first = tiles.begin * tile_keys, end = min(tiles.end * tile_keys, p.keys);
    const int chunks = p.width / 8;
    for (int i = first * chunks + threadIdx.x; i < end * chunks; i += block_threads) {
        const int64_t at = i / chunks * strides.row + i % chunks * 8;
        simt::store16(rows_of<T>(p.dk, strides, unit.batch, unit.head) + at, make_uint4(0, 0, 0, 0));
        simt::store16(rows_of<T>(p.dv, strides, unit.batch, unit.head) + at, make_uint4(0, 0, 0, 0));
    }
}

// Rows that see a key of the tile lie in this interval
__device__ __forceinline__ Range rows_seeing(const Problem& p, int batch, int first_key) {
    const Range all = {0, p.queries};
    if (first_key >= keys_of(p, batch)) return {0, 0};
    if (!p.first) return all;
    const int lane = threadIdx.x % simt::warp_size;
    Range rows = {p.queries, 0};
    for (int key = first_key + lane; key < min(first_key + tile_keys, p.keys);
         key += simt::warp_size) {
        const int64_t at = static_cast<int64_t>(p.interval_batches > 1 ? batch : 0) * p.keys + key;
        const Range mine = intersection({p.first[at], p.last[at]}, all);
        if (mine.begin < mine.end)
            rows = {min(rows.begin, mine.begin), max(rows.end, mine.end)};
    }
    for (int step = simt::warp_size / 2; step > 0; step /= 2) {
        rows.begin = min(rows.begin, __shfl_xor_sync(simt::full_mask, rows.begin, step));
        rows.end = max(rows.end, __shfl_xor_sync(simt::full_mask, rows.end, step));
    }
    return rows.begin < rows.end ? rows : Range{0, 0};
}

// Passes that keep a tile of rows: keys stream by
template <class T, int depth, int row_tiles, Pass pass>
__device__ __forceinline__ void stream_keys(const Problem& p, const BackwardPartials& partials,
                                            BackwardMemory<T, depth, row_tiles>& memory,
                                            const Unit& unit, int first_row, Range share, int split) {
    using Memory = BackwardMemory<T, depth, row_tiles>;
    fetch_rows(p, memory, unit, first_row);
    const Sight sight = look<Memory::rows>(p, unit.batch, first_row, memory.seen);
    Range tiles = intersection(sight.tiles(), share);
    if (tiles.begin >= tiles.end) tiles = {share.end, share.end};
    const KeyRing<T, depth> ring = key_ring<T, depth>(p, memory.ring, unit.batch, unit.head);
    ring.start(tiles);
    tc::wait<KeyRing<T, depth>::stages - 1>();
    __syncthreads();
    describe_rows<T, depth, row_tiles, pass>(p, partials, memory, unit, first_row);

    RowGradient<depth, row_tiles> gradient;
    clear(gradient);
    for (int tile = tiles.begin; tile < tiles.end; tile++) {
        ring.advance(tile, tiles);
        T *k = ring.k_tile(tile), *v = ring.v_tile(tile);
        measure_rows<T, depth, tile_keys>(k, memory.key_length, memory.key_exact, p.eps);
        __syncthreads();
        const int first_key = tile * tile_keys;
        KeySums<depth> sums;
        clear(sums);
        for (int row = 0; row < Memory::rows; row += 16)
            differentiate<T, depth, row_tiles, pass>(p, memory, unit, sums, k, v, first_key,
                                                     first_row, row, sight.whole(first_key));
        __syncthreads();  // all of dz is there
        add_to_rows(memory, gradient, k);
        if constexpr (pass == Pass::both) {
            __syncthreads();  // the keys are read, their gradients may take their place
            store_key_gradients(p, memory, unit, sums, k, v, first_key);
        }
    }
    if constexpr (pass == Pass::both) {
        store_zeros<T>(p, unit, {share.begin, tiles.begin});
        store_zeros<T>(p, unit, {tiles.end, share.end});
    }
    tc::wait<0>();
    __syncthreads();
    lay_down(memory, gradient);
    __syncthreads();
    if (p.splits == 1 || pass == Pass::queries) {
        project_rows<T, Memory::rows>(
            p, partials, unit, first_row, memory.turned, [&](int row, int channel) {
                const float* x = memory.sums() + row * Memory::sum_pitch + channel;
                return make_float2(x[0], x[1]);
            });
        return;
    }
    const int64_t unit_rows = (static_cast<int64_t>(split) * p.batch + unit.batch) * p.heads;
    float* to = partials.dq + ((unit_rows + unit.head) * p.queries + first_row) * p.width;
    for (int i = threadIdx.x; i < min(Memory::rows, p.queries - first_row) * p.width;
         i += block_threads)
        to[i] = memory.sums()[i / p.width * Memory::sum_pitch + i % p.width];
}

// The pass that keeps a tile of keys: rows stream by
template <class T, int depth, int row_tiles>
__device__ __forceinline__ void stream_rows(const Problem& p, const BackwardPartials& partials,
                                            BackwardMemory<T, depth, row_tiles>& memory,
                                            const Unit& unit, int tile) {
    using Memory = BackwardMemory<T, depth, row_tiles>;
    const int first_key = tile * tile_keys;
    const Range rows = rows_seeing(p, unit.batch, first_key);
    const Range row_blocks = {rows.begin / Memory::rows, tiles_for(rows.end, Memory::rows)};
    const KeyRing<T, depth> ring = key_ring<T, depth>(p, memory.ring, unit.batch, unit.head);
    T *k = ring.k_tile(tile), *v = ring.v_tile(tile);
    ring.fetch(tile, {tile, tile + 1});
    KeySums<depth> sums;
    clear(sums);
    for (int block = row_blocks.begin; block < row_blocks.end; block++) {
        const int first_row = block * Memory::rows;
        fetch_rows(p, memory, unit, first_row);
        const Sight sight = look<Memory::rows>(p, unit.batch, first_row, memory.seen);
        tc::wait<0>();
        __syncthreads();
        if (block == row_blocks.begin)
            measure_rows<T, depth, tile_keys>(k, memory.key_length, memory.key_exact, p.eps);
        describe_rows<T, depth, row_tiles, Pass::keys>(p, partials, memory, unit, first_row);
        __syncthreads();
        for (int row = 0; row < Memory::rows; row += 16)
            differentiate<T, depth, row_tiles, Pass::keys>(p, memory, unit, sums, k, v, first_key,
                                                           first_row, row, sight.whole(first_key));
        __syncthreads();  // the rows are read, the next may take their place
    }
    if (row_blocks.begin < row_blocks.end)
        store_key_gradients(p, memory, unit, sums, k, v, first_key);
    else
        store_zeros<T>(p, unit, {tile, tile + 1});
    tc::wait<0>();
    __syncthreads();
}

// Block: (group of batches, one of those that share a bias, head, part). A part is a split of the
// keys, a tile of rows or a tile of keys, by pass.
template <class T, int depth, int row_tiles, Pass pass>
__global__ void __launch_bounds__(block_threads)
    cosine_attention_backward(Problem p, BackwardPartials partials, int parts, int groups) {
    using Memory = BackwardMemory<T, depth, row_tiles>;
    SIMT_DYNAMIC_SHARED(Memory, shared);
    Memory& memory = *shared;
    const int part = blockIdx.x % parts, head = blockIdx.x / parts % p.heads;
    const int first_batch = blockIdx.x / parts / p.heads;  // group * bias_batches + number of bias
    const int group = first_batch / p.bias_batches;
    const int64_t offset = bias_offset(p, first_batch, head);
    const int64_t group_size =
        static_cast<int64_t>(p.bias_batches) * p.heads * p.queries * p.keys;
    Unit unit = {0, head, logit_scale(p, head), p.bias ? p.bias + offset : nullptr,
                 partials.dbias ? partials.dbias + group * group_size + offset : nullptr};
    for (int batch = first_batch; batch < p.batch; batch += groups * p.bias_batches) {
        unit.batch = batch;
        if constexpr (pass == Pass::keys) {
            stream_rows(p, partials, memory, unit, part);
        } else if constexpr (pass == Pass::queries) {
            stream_keys<T, depth, row_tiles, pass>(p, partials, memory, unit, part * Memory::rows,
                                                   {0, tiles_for(p.keys, tile_keys)}, 0);
        } else {
            const Range share = part_of(tiles_for(p.keys, tile_keys), part, parts);
            stream_keys<T, depth, row_tiles, pass>(p, partials, memory, unit, 0, share, part);
        }
        __syncthreads();  // the next batch reuses the memory
    }
}

// Adds dq over the splits of the keys, in order, and projects it. Block: (batch, head)
template <class T, int rows>
__global__ void __launch_bounds__(block_threads)
    cosine_attention_finish_rows(Problem p, BackwardPartials partials) {
    SIMT_SHARED(float, turned, block_warps);
    const int head = blockIdx.x % p.heads;
    const Unit unit = {static_cast<int>(blockIdx.x / p.heads), head, logit_scale(p, head), nullptr,
                       nullptr};
    const int64_t split_size = static_cast<int64_t>(p.batch) * p.heads * p.queries * p.width;
    const float* from = partials.dq + static_cast<int64_t>(blockIdx.x) * p.queries * p.width;
    project_rows<T, rows>(p, partials, unit, 0, turned, [&](int row, int channel) {
        float2 sum = make_float2(0.0f, 0.0f);
        for (int split = 0; split < p.splits; split++) {
            const float* x = from + split * split_size + row * p.width + channel;
            sum.x += x[0];
            sum.y += x[1];
        }
        return sum;
    });
}

// dlog_scale of a head: the sum of t over batches and rows. Block: one warp, a head
__global__ void __launch_bounds__(32)
    cosine_attention_scale_gradient(Problem p, BackwardPartials partials, int blocks) {
    const int head = blockIdx.x;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < p.batch * blocks; i += simt::warp_size) {
        const int64_t batch_head = static_cast<int64_t>(i / blocks) * p.heads + head;
        sum += partials.scale[batch_head * blocks + i % blocks];
    }
    sum = sum_over<32>(sum);
    if (threadIdx.x == 0) p.dlog_scale[head] = p.log_scale[head] <= p.log_scale_max ? sum : 0.0f;
}

// Zeros, and sums over the groups of batches in order
__global__ void __launch_bounds__(block_threads) cosine_attention_clear(float* x, int64_t count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
    if (i < count) x[i] = 0.0f;
}
__global__ void __launch_bounds__(block_threads)
    cosine_attention_add_groups(const float* parts, float* sum, int64_t count, int groups) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
    if (i >= count) return;
    float x = 0.0f;
    for (int group = 0; group < groups; group++) x += parts[group * count + i];
    sum[i] = x;
}
}  // namespace cosine
