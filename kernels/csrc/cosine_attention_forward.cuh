// Forward pass of cosine attention.
//
// Warps share the block's query rows and, where there are fewer than 64, also the keys of a tile.
//
// Softmax without a running maximum. Logits lie in [-s, s + largest bias], so a fixed reference
// m = max(s + largest bias - 60, 0) can neither overflow (e^60 times a million keys is 1e32) nor,
// while s <= 68, lose a row; slices and splits of the keys add up without rescaling. A row whose
// sum ends below 2^-60 may have lost terms to the smallest exponent (only with s above 68 and all
// its cosines low, or a very negative bias): its block runs again with a running maximum.
// Probabilities in fp16 have no such range, so fp16 always keeps a running maximum.
//
// Reads each input once and writes out and lse; a split of the keys writes its sums in fp32 instead,
// and a second kernel adds them in fixed order.
#pragma once
#include "cosine_attention_tile.cuh"

namespace cosine {
constexpr float reference_headroom = 60.0f;
constexpr float smallest_safe_sum = 0x1p-60f;

// The exponent's reference: chosen once, or the largest logit so far
enum class Reference { fixed, running };

// Sums of a split of the keys, or null pointers
struct ForwardPartials {
    float* out;        // [splits, batch * heads, queries, width], not divided
    float* sum;        // [splits, batch * heads, queries]
    float* reference;  // the same, base 2
    float* bias_bound; // [heads], largest bias of each head
};

template <class T, int depth, int row_tiles>
struct ForwardMemory {
    static constexpr int rows = 16 * row_tiles;
    static constexpr int slices = block_warps / row_tiles;
    using Ring = KeyRing<T, depth>;

    alignas(128) T ring[Ring::elements];
    T q[rows * pitch<depth>];
    float key_length[tile_keys], key_exact[tile_keys];
    float row_length[rows], row_exact[rows];
    Range seen[rows];
    float sum[rows], reference[rows];
    int lost_terms;
    // Accumulators of the second slice, once all tiles are used
    __device__ float* exchanged() { return reinterpret_cast<float*>(ring); }
};

// One warp's 16 query rows: unnormalised output, sums and references of rows g and g + 8
template <int depth>
struct RowSums {
    float out[depth / 8][4];
    float sum[2], reference[2];
    float shift[2];  // factor of the products with keys: s log2(e) / |q|
    Range seen[2];
    const float* bias[2];
};

template <int depth>
__device__ __forceinline__ void clear(RowSums<depth>& rows, float reference) {
#pragma unroll
    for (int tile = 0; tile < depth / 8; tile++)
        for (int i = 0; i < 4; i++) rows.out[tile][i] = 0.0f;
    for (int half = 0; half < 2; half++) {
        rows.sum[half] = 0.0f;
        rows.reference[half] = reference;
    }
}

// Raises the references to the largest of 16 new logits of each row and rescales what is summed
template <int depth>
__device__ __forceinline__ void raise_references(RowSums<depth>& rows, const float (&z)[2][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float* left = &z[0][2 * half];
        const float* right = &z[1][2 * half];
        float top = fmaxf(fmaxf(left[0], left[1]), fmaxf(right[0], right[1]));
        top = fmaxf(top, __shfl_xor_sync(simt::full_mask, top, 1));
        top = fmaxf(top, __shfl_xor_sync(simt::full_mask, top, 2));
        const float before = rows.reference[half];
        top = fmaxf(top, before);
        if (top == before) continue;  // also while nothing was seen, where both are -infinity
        rows.reference[half] = top;
        const float factor = simt::exp2_approx(before - top);
        rows.sum[half] *= factor;
#pragma unroll
        for (int tile = 0; tile < depth / 8; tile++) {
            rows.out[tile][2 * half] *= factor;
            rows.out[tile][2 * half + 1] *= factor;
        }
    }
}

// 16 keys of a tile, from row `key` of it
template <class T, int depth, Reference kind>
__device__ __forceinline__ void attend_keys(RowSums<depth>& rows, const uint32_t (&q)[depth / 16][4],
                                            const T* k_tile, const T* v_tile,
                                            const float* key_length, int first_key, int key,
                                            bool whole) {
    const int lane = threadIdx.x % simt::warp_size, t = lane % 4;
    float z[2][4] = {};
#pragma unroll
    for (int c = 0; c < depth / 16; c++) {
        uint32_t k[4];
        tc::load_tiles(k, operand_of_rows<pitch<depth>>(k_tile, key, 16 * c, lane));
        tc::multiply<T>(z[0], q[c], k[0], k[1]);
        tc::multiply<T>(z[1], q[c], k[2], k[3]);
    }
    uint32_t p[4];
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        for (int i = 0; i < 4; i++) {
            const int half = i / 2, column = key + 8 * tile + 2 * t + i % 2;
            const int at = first_key + column;
            const Range seen = rows.seen[half];
            float logit = -infinity;
            if (whole || (seen.begin <= at && at < seen.end)) {
                logit = z[tile][i] * key_length[column] * rows.shift[half];
                if (rows.bias[half]) logit += rows.bias[half][at] * log2_e;
            }
            z[tile][i] = logit;
        }
    }
    if constexpr (kind == Reference::running) raise_references<depth>(rows, z);
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        float e[4];
        for (int i = 0; i < 4; i++) {
            const float reference = rows.reference[i / 2];
            // a running reference is -infinity until the row sees a key
            e[i] = z[tile][i] == -infinity ? 0.0f : simt::exp2_approx(z[tile][i] - reference);
            rows.sum[i / 2] += e[i];
        }
        p[2 * tile] = simt::pack2<T>(e[0], e[1]);
        p[2 * tile + 1] = simt::pack2<T>(e[2], e[3]);
    }
#pragma unroll
    for (int c = 0; c < depth / 16; c++) {
        uint32_t v[4];
        tc::load_tiles_transposed(v, operand<pitch<depth>>(v_tile, key, 16 * c, lane));
        tc::multiply<T>(rows.out[2 * c], p, v[0], v[1]);
        tc::multiply<T>(rows.out[2 * c + 1], p, v[2], v[3]);
    }
}

// The second slice of the keys, held by other warps, is added to the first
template <class T, int depth, int row_tiles>
__device__ __forceinline__ void add_slices(ForwardMemory<T, depth, row_tiles>& memory,
                                           RowSums<depth>& rows, int row_tile, int slice) {
    static_assert(ForwardMemory<T, depth, row_tiles>::slices <= 2);
    const int lane = threadIdx.x % simt::warp_size, g = lane / 4, t = lane % 4;
    float* mine = memory.exchanged() + (row_tile * simt::warp_size + lane) * (depth / 2);
    __syncthreads();  // the last tile is still being read
    if (slice == 1) {
#pragma unroll
        for (int tile = 0; tile < depth / 8; tile++)
            for (int i = 0; i < 4; i++) mine[4 * tile + i] = rows.out[tile][i];
        for (int half = 0; half < 2 && t == 0; half++) {
            memory.sum[16 * row_tile + g + 8 * half] = rows.sum[half];
            memory.reference[16 * row_tile + g + 8 * half] = rows.reference[half];
        }
    }
    __syncthreads();
    if (slice == 1) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float sum = memory.sum[16 * row_tile + g + 8 * half];
        const float reference = memory.reference[16 * row_tile + g + 8 * half];
        const float top = fmaxf(reference, rows.reference[half]);
        // equal references, the rule, give factors of exactly 1; an empty slice has none
        const float ours =
            rows.sum[half] == 0.0f ? 0.0f : simt::exp2_approx(rows.reference[half] - top);
        const float theirs = sum == 0.0f ? 0.0f : simt::exp2_approx(reference - top);
        rows.sum[half] = rows.sum[half] * ours + sum * theirs;
        rows.reference[half] = top;
#pragma unroll
        for (int tile = 0; tile < depth / 8; tile++)
            for (int i = 2 * half; i < 2 * half + 2; i++)
                rows.out[tile][i] = rows.out[tile][i] * ours + mine[4 * tile + i] * theirs;
    }
}

// All tiles of keys in `tiles`
template <class T, int depth, int row_tiles, Reference kind>
__device__ __forceinline__ void attend(const Problem& p, ForwardMemory<T, depth, row_tiles>& memory,
                                       const KeyRing<T, depth>& ring, RowSums<depth>& rows,
                                       const uint32_t (&q)[depth / 16][4], Range tiles,
                                       const Sight& sight) {
    constexpr int slices = ForwardMemory<T, depth, row_tiles>::slices;
    const int warp = threadIdx.x / simt::warp_size, row_tile = warp % row_tiles;
    const int slice = warp / row_tiles, slice_keys = tile_keys / slices;
    for (int tile = tiles.begin; tile < tiles.end; tile++) {
        ring.advance(tile, tiles);
        measure_rows<T, depth, tile_keys>(ring.k_tile(tile), memory.key_length, memory.key_exact,
                                          p.eps);
        __syncthreads();
        const int first_key = tile * tile_keys;
        const bool whole = sight.whole(first_key);
        for (int key = slice * slice_keys; key < (slice + 1) * slice_keys; key += 16)
            attend_keys<T, depth, kind>(rows, q, ring.k_tile(tile), ring.v_tile(tile),
                                        memory.key_length, first_key, key, whole);
    }
    for (int half = 0; half < 2; half++) rows.sum[half] = sum_over<4>(rows.sum[half]);
    if (slices > 1) add_slices(memory, rows, row_tile, slice);
}

// A row with keys in [begin, end) whose sum is too small for the fixed reference
__device__ __forceinline__ bool lost_terms(Range seen, Range keys, float sum) {
    const Range both = intersection(seen, keys);
    return both.begin < both.end && !(sum >= smallest_safe_sum);
}

template <class T, int depth>
__device__ __forceinline__ void write_output(const Problem& p, RowSums<depth>& rows, T* own_rows,
                                             int batch, int head, int first_row) {
    const int lane = threadIdx.x % simt::warp_size, g = lane / 4, t = lane % 4;
    float share[2];
    for (int half = 0; half < 2; half++) {
        const int row = first_row + g + 8 * half;
        const float sum = rows.sum[half];
        share[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
        if (t == 0 && row < p.queries)
            p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.queries + row] =
                sum == 0.0f ? -infinity : (rows.reference[half] + log2f(sum)) * ln_2;
    }
    const MmtrainStrides strides = contiguous(p, p.queries);
    T* out = rows_of<T>(p.out, strides, batch, head) + first_row * strides.row;
    store_rows<T, depth>(own_rows, out, strides.row, p.queries - first_row, p.width,
                         [&](int tile, int i) { return rows.out[tile][i] * share[i / 2]; });
}

template <int depth>
__device__ __forceinline__ void write_partials(const Problem& p, const ForwardPartials& partials,
                                               const RowSums<depth>& rows, int64_t first,
                                               int first_row) {
    const int lane = threadIdx.x % simt::warp_size, g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; half++) {
        const int row = first_row + g + 8 * half;
        if (row >= p.queries) continue;
        if (t == 0) {
            partials.sum[first + row] = rows.sum[half];
            partials.reference[first + row] = rows.reference[half];
        }
        float* out = partials.out + (first + row) * p.width;
#pragma unroll
        for (int tile = 0; tile < depth / 8; tile++) {
            if (8 * tile >= p.width) continue;
            out[8 * tile + 2 * t] = rows.out[tile][2 * half];
            out[8 * tile + 2 * t + 1] = rows.out[tile][2 * half + 1];
        }
    }
}

// Block: (batch, head, tile of query rows, split of the keys)
template <class T, int depth, int row_tiles>
__global__ void __launch_bounds__(block_threads)
    cosine_attention_forward(Problem p, ForwardPartials partials) {
    using Memory = ForwardMemory<T, depth, row_tiles>;
    SIMT_DYNAMIC_SHARED(Memory, shared);
    Memory& memory = *shared;
    const int lane = threadIdx.x % simt::warp_size, warp = threadIdx.x / simt::warp_size;
    const int row_tile = warp % row_tiles, g = lane / 4;

    const int row_blocks = tiles_for(p.queries, Memory::rows);
    const int split = blockIdx.x % p.splits, unit = blockIdx.x / p.splits;
    const int first_row = unit % row_blocks * Memory::rows, batch_head = unit / row_blocks;
    const int batch = batch_head / p.heads, head = batch_head % p.heads;

    fetch_tile<T, depth, Memory::rows>(memory.q, rows_of<T>(p.q, p.q_strides, batch, head),
                                       p.q_strides.row, first_row, p.queries, p.width);
    tc::commit();
    const Sight sight = look<Memory::rows>(p, batch, first_row, memory.seen);
    const Range share = part_of(tiles_for(p.keys, tile_keys), split, p.splits);
    const Range tiles = intersection(sight.tiles(), share);
    const KeyRing<T, depth> ring = key_ring<T, depth>(p, memory.ring, batch, head);
    ring.start(tiles);
    if (threadIdx.x == 0) memory.lost_terms = 0;
    tc::wait<KeyRing<T, depth>::stages - 1>();
    __syncthreads();
    measure_rows<T, depth, Memory::rows>(memory.q, memory.row_length, memory.row_exact, p.eps);
    __syncthreads();

    const float scale = logit_scale(p, head);
    RowSums<depth> rows;
    uint32_t q[depth / 16][4];
#pragma unroll
    for (int c = 0; c < depth / 16; c++)
        tc::load_tiles(q[c], operand<pitch<depth>>(memory.q, 16 * row_tile, 16 * c, lane));
    for (int half = 0; half < 2; half++) {
        const int row = 16 * row_tile + g + 8 * half;
        rows.shift[half] = scale * log2_e * memory.row_length[row];
        rows.seen[half] = memory.seen[row];
        rows.bias[half] = nullptr;
        if (p.bias && first_row + row < p.queries)
            rows.bias[half] = p.bias + bias_offset(p, batch, head) +
                              static_cast<int64_t>(first_row + row) * p.keys;
    }

    if constexpr (narrow_exponent<T>) {
        clear(rows, -infinity);
        attend<T, depth, row_tiles, Reference::running>(p, memory, ring, rows, q, tiles, sight);
    } else {
        const float bound = scale + (p.bias ? partials.bias_bound[head] : 0.0f);
        clear(rows, fmaxf(bound - reference_headroom, 0.0f) * log2_e);
        attend<T, depth, row_tiles, Reference::fixed>(p, memory, ring, rows, q, tiles, sight);
        const Range keys = {tiles.begin * tile_keys, tiles.end * tile_keys};
        if (warp < row_tiles)
            for (int half = 0; half < 2; half++)
                if (lost_terms(rows.seen[half], keys, rows.sum[half])) memory.lost_terms = 1;
        __syncthreads();
        if (memory.lost_terms) {
            tc::wait<0>();
            ring.start(tiles);
            clear(rows, -infinity);
            attend<T, depth, row_tiles, Reference::running>(p, memory, ring, rows, q, tiles, sight);
        }
    }
    tc::wait<0>();
    if (warp >= row_tiles) return;
    const int warp_row = first_row + 16 * row_tile;
    if (p.splits == 1)
        return write_output<T, depth>(p, rows, memory.q + 16 * row_tile * pitch<depth>, batch, head,
                                      warp_row);
    const int64_t unit_rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
    write_partials<depth>(p, partials, rows,
                          split * unit_rows + static_cast<int64_t>(batch_head) * p.queries, warp_row);
}

// Adds the splits of the keys, in order. A warp does a row of one head.
template <class T>
__global__ void __launch_bounds__(block_threads)
    cosine_attention_add_splits(Problem p, ForwardPartials partials) {
    const int lane = threadIdx.x % simt::warp_size, warp = threadIdx.x / simt::warp_size;
    const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * block_warps + warp;
    if (at >= rows) return;
    float top = -infinity, sum = 0.0f, out[4] = {};
    for (int split = 0; split < p.splits; split++)
        if (partials.sum[split * rows + at] != 0.0f)
            top = fmaxf(top, partials.reference[split * rows + at]);
    for (int split = 0; split < p.splits; split++) {
        const int64_t from = split * rows + at;
        if (partials.sum[from] == 0.0f) continue;  // saw no key
        const float weight = simt::exp2_approx(partials.reference[from] - top);
        sum += partials.sum[from] * weight;
        for (int i = 0; i < 4; i++) {
            const int channel = lane + simt::warp_size * i;
            if (channel < p.width) out[i] += partials.out[from * p.width + channel] * weight;
        }
    }
    const int row = static_cast<int>(at % p.queries), batch_head = static_cast<int>(at / p.queries);
    const MmtrainStrides strides = contiguous(p, p.queries);
    T* to = rows_of<T>(p.out, strides, batch_head / p.heads, batch_head % p.heads);
    const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int i = 0; i < 4; i++) {
        const int channel = lane + simt::warp_size * i;
        if (channel < p.width)
            to[row * strides.row + channel] = simt::from_float<T>(out[i] * share);
    }
    if (lane == 0) p.lse[at] = sum == 0.0f ? -infinity : (top + log2f(sum)) * ln_2;
}

// Largest bias of each head, a block a head
__global__ void __launch_bounds__(block_threads) cosine_attention_bias_bound(Problem p, float* bound) {
    SIMT_SHARED(float, tops, block_warps);
    const int head = blockIdx.x;
    const int64_t count = static_cast<int64_t>(p.queries) * p.keys;
    float top = -infinity;
    for (int batch = 0; batch < p.bias_batches; batch++) {
        const float* bias = p.bias + bias_offset(p, batch, head);
        for (int64_t i = threadIdx.x; i < count; i += block_threads) top = fmaxf(top, bias[i]);
    }
    for (int step = simt::warp_size / 2; step > 0; step /= 2)
        top = fmaxf(top, __shfl_xor_sync(simt::full_mask, top, step));
    if (threadIdx.x % simt::warp_size == 0) tops[threadIdx.x / simt::warp_size] = top;
    __syncthreads();
    if (threadIdx.x == 0)
        bound[head] = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
}
}  // namespace cosine
