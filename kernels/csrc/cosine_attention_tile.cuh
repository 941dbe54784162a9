// What the forward and the backward kernels of cosine attention share: tiles in shared memory, the
// lengths of their rows, the keys that query rows see, and where a block stands in the problem.
//
// A block has 4 warps, holds 16 * row_tiles query rows and walks over tiles of 64 keys. `depth` is
// the width of a head rounded up to a multiple of 16; channels past the width are zeros, so that
// one kernel serves two widths (72 and 80, 88 and 96, ...).
//
// Rows are not normalised in shared memory: products of raw 16-bit rows are exact in fp32, and both
// reciprocal lengths are applied to the sum. Rounding q / |q| to 16 bits first costs up to 0.18 in a
// logit at scale 100. Keys are measured while they lie in shared memory.
#pragma once
#include "cosine_attention.h"
#include "tc.h"

namespace cosine {
using Problem = MmtrainCosineAttention;

constexpr int block_threads = 128;
constexpr int block_warps = block_threads / simt::warp_size;
constexpr int tile_keys = 64;
constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;
constexpr float infinity = INFINITY;

// Rows of a tile are 16 bytes further apart than they are long: ldmatrix then meets no bank twice
template <int depth>
constexpr int pitch = depth + 8;

// The exponents of fp16 end at 2^-24 and 2^16: its rows are brought to a length of 1 to 2
template <class T>
constexpr bool narrow_exponent = false;
template <>
constexpr bool narrow_exponent<simt::fp16> = true;

// Interval [begin, end)
struct Range {
    int begin, end;
};
__device__ __forceinline__ Range intersection(Range a, Range b) {
    return {max(a.begin, b.begin), min(a.end, b.end)};
}

// Part `part` of `parts` nearly equal parts of `count` tiles
__device__ __forceinline__ Range part_of(int count, int part, int parts) {
    return {static_cast<int>(static_cast<int64_t>(count) * part / parts),
            static_cast<int>(static_cast<int64_t>(count) * (part + 1) / parts)};
}

__host__ __device__ __forceinline__ int tiles_for(int count, int size) {
    return (count + size - 1) / size;
}

template <class T>
__device__ __forceinline__ T* rows_of(const void* x, const MmtrainStrides& strides, int batch,
                                      int head) {
    return static_cast<T*>(const_cast<void*>(x)) + batch * strides.batch + head * strides.head;
}
__device__ __forceinline__ MmtrainStrides contiguous(const Problem& p, int rows) {
    const int64_t row = static_cast<int64_t>(p.heads) * p.width;
    return {row * rows, row, p.width};
}

__device__ __forceinline__ float logit_scale(const Problem& p, int head) {
    return expf(fminf(p.log_scale[head], p.log_scale_max));
}

// First element of the bias, or of anything like it, of one batch and head
__device__ __forceinline__ int64_t bias_offset(const Problem& p, int batch, int head) {
    const int64_t matrix = static_cast<int64_t>(p.queries) * p.keys;
    return (static_cast<int64_t>(batch % p.bias_batches) * p.heads + head) * matrix;
}

__device__ __forceinline__ int keys_of(const Problem& p, int batch) {
    return p.key_lengths ? min(p.key_lengths[batch], p.keys) : p.keys;
}

// Sum over neighbouring lanes, a power of two of them
template <int lanes>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(simt::full_mask, x, step);
    return x;
}

// Eight elements
struct Words {
    uint32_t at[4];
};
__device__ __forceinline__ Words as_words(uint4 v) { return {{v.x, v.y, v.z, v.w}}; }

// Largest power of two that is not above x, for positive normal x
__device__ __forceinline__ float power_of_two_below(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    word &= 0x7f800000u;
    memcpy(&x, &word, 4);
    return x;
}

// Starts to copy rows [first, first + rows) to a tile. Rows from `end` on are zeros: what lies
// there, in padding, may be anything, and 0 * NaN is not 0.
template <class T, int depth, int rows>
__device__ __forceinline__ void fetch_tile(T* tile, const T* source, int64_t stride, int first,
                                           int end, int width) {
    constexpr int chunks = depth / 8;
    for (int i = threadIdx.x; i < rows * chunks; i += block_threads) {
        const int row = i / chunks, channel = i % chunks * 8;
        const bool there = first + row < end && channel < width;
        tc::copy16(tile + row * pitch<depth> + channel,
                   there ? source + (first + row) * stride + channel : source, there);
    }
}

// Reciprocal lengths of a tile's rows. `scaled` belongs to the rows as they lie in the tile
// afterwards, `exact` to the rows of the input; they differ by a power of two, for fp16 only.
// Neighbouring lanes share a row; rows are read in chunks of 16 bytes.
template <class T, int depth, int rows>
__device__ __forceinline__ void measure_rows(T* tile, float* scaled, float* exact, float eps) {
    constexpr int team = block_threads / rows, chunks = depth / 8;
    const int row = threadIdx.x / team, member = threadIdx.x % team;
    T* x = tile + row * pitch<depth>;
    float squares = 0.0f;
    for (int c = member; c < chunks; c += team) {
        const Words words = as_words(simt::shared_load16(x + 8 * c));
        for (int i = 0; i < 4; i++) {
            const float2 pair = simt::unpack2<T>(words.at[i]);
            squares += pair.x * pair.x + pair.y * pair.y;
        }
    }
    const float length = fmaxf(sqrtf(sum_over<team>(squares)), eps);
    float factor = 1.0f;
    if constexpr (narrow_exponent<T>) {
        factor = 1.0f / power_of_two_below(length);
        for (int c = member; c < chunks; c += team) {
            Words words = as_words(simt::shared_load16(x + 8 * c));
            for (int i = 0; i < 4; i++) {
                const float2 pair = simt::unpack2<T>(words.at[i]);
                words.at[i] = simt::pack2<T>(pair.x * factor, pair.y * factor);
            }
            simt::shared_store16(x + 8 * c,
                                 make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]));
        }
    }
    if (member == 0) {
        exact[row] = 1.0f / length;
        scaled[row] = 1.0f / (length * factor);
    }
}

// A row shorter than eps is divided by eps, a constant: its gradient is not projected
__device__ __forceinline__ bool longer_than_eps(float reciprocal, float eps) {
    return reciprocal * eps < 0.99999f;
}

// Keys that query row `row` sees, cut to the key length of its batch; none past the last row
__device__ __forceinline__ Range keys_seen(const Problem& p, int batch, int row) {
    if (row >= p.queries) return {0, 0};
    const Range all = {0, keys_of(p, batch)};
    if (!p.lo) return all;
    const int64_t at = static_cast<int64_t>(p.interval_batches > 1 ? batch : 0) * p.queries + row;
    return intersection({p.lo[at], p.hi[at]}, all);
}

// What a tile of query rows sees: tiles of keys outside `any` are skipped, tiles inside `all` need
// no test of single elements
struct Sight {
    Range any, all;
    __device__ __forceinline__ Range tiles() const {
        return any.begin < any.end ? Range{any.begin / tile_keys, tiles_for(any.end, tile_keys)}
                                   : Range{0, 0};
    }
    __device__ __forceinline__ bool whole(int first_key) const {
        return all.begin <= first_key && first_key + tile_keys <= all.end;
    }
};

// Fills seen[rows] of shared memory and gives the sight of the tile. Every warp reduces all rows.
// Rows past the last one do not count, unless a bias would be read for them.
template <int rows>
__device__ __forceinline__ Sight look(const Problem& p, int batch, int first_row, Range* seen) {
    const int lane = threadIdx.x % simt::warp_size, warp = threadIdx.x / simt::warp_size;
    Range any = {p.keys, 0}, all = {0, p.keys};
    for (int row = lane; row < rows; row += simt::warp_size) {
        const Range mine = keys_seen(p, batch, first_row + row);
        if (warp == 0) seen[row] = mine;
        if (first_row + row >= p.queries && !p.bias) continue;
        all = intersection(all, mine);
        if (mine.begin < mine.end) any = {min(any.begin, mine.begin), max(any.end, mine.end)};
    }
    if (!p.lo && !p.bias) return {{0, keys_of(p, batch)}, {0, keys_of(p, batch)}};
    for (int step = simt::warp_size / 2; step > 0; step /= 2) {
        any.begin = min(any.begin, __shfl_xor_sync(simt::full_mask, any.begin, step));
        any.end = max(any.end, __shfl_xor_sync(simt::full_mask, any.end, step));
        all.begin = max(all.begin, __shfl_xor_sync(simt::full_mask, all.begin, step));
        all.end = min(all.end, __shfl_xor_sync(simt::full_mask, all.end, step));
    }
    return {any, all};
}

// Address that lane `lane` gives to load_tiles for a 16 x 16 operand at (row, channel) of a tile:
// `a` of a product, and, transposed, the two `b` whose depth are the tile's rows
template <int row_pitch, class T>
__device__ __forceinline__ const T* operand(const T* tile, int row, int channel, int lane) {
    return tile + (row + lane % 16) * row_pitch + channel + lane / 16 * 8;
}
// The two `b` of 8 columns each whose columns are rows of the tile
template <int row_pitch, class T>
__device__ __forceinline__ const T* operand_of_rows(const T* tile, int row, int channel, int lane) {
    return tile + (row + lane % 8 + lane / 16 * 8) * row_pitch + channel + lane / 8 % 2 * 8;
}

// Tiles of keys and values, fetched ahead of their use into a ring of stages
template <class T, int depth>
struct KeyRing {
    static constexpr int stages = depth <= 64 ? 3 : 2;
    static constexpr int tile_elements = tile_keys * pitch<depth>;
    static constexpr int elements = stages * 2 * tile_elements;

    T* memory;
    const T *k, *v;
    int64_t k_stride, v_stride;
    int keys, width;

    __device__ __forceinline__ T* k_tile(int tile) const {
        return memory + tile % stages * 2 * tile_elements;
    }
    __device__ __forceinline__ T* v_tile(int tile) const { return k_tile(tile) + tile_elements; }

    // One group of copies, empty where there is no such tile, so that groups count tiles
    __device__ __forceinline__ void fetch(int tile, Range tiles) const {
        if (tile < tiles.end) {
            const int first = tile * tile_keys;
            fetch_tile<T, depth, tile_keys>(k_tile(tile), k, k_stride, first, keys, width);
            fetch_tile<T, depth, tile_keys>(v_tile(tile), v, v_stride, first, keys, width);
        }
        tc::commit();
    }
    __device__ __forceinline__ void start(Range tiles) const {
        for (int i = 0; i < stages - 1; i++) fetch(tiles.begin + i, tiles);
    }
    // Until `tile` has arrived and nobody reads the one before it; then fetches into its place
    __device__ __forceinline__ void advance(int tile, Range tiles) const {
        tc::wait<stages - 2>();
        __syncthreads();
        fetch(tile + stages - 1, tiles);
    }
};

template <class T, int depth>
__device__ __forceinline__ KeyRing<T, depth> key_ring(const Problem& p, T* memory, int batch,
                                                      int head) {
    return {memory,
            rows_of<T>(p.k, p.k_strides, batch, head),
            rows_of<T>(p.v, p.v_strides, batch, head),
            p.k_strides.row,
            p.v_strides.row,
            keys_of(p, batch),
            p.width};
}

// A warp rounds 16 accumulated rows into its own rows of shared memory and stores them in chunks of
// 16 bytes. value(tile, i) is element i of the accumulators of channels 8 tile to 8 tile + 7.
template <class T, int depth, class Value>
__device__ __forceinline__ void store_rows(T* own_rows, T* to, int64_t stride, int rows, int width,
                                           Value value) {
    const int lane = threadIdx.x % simt::warp_size, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < depth / 8; tile++) {
        for (int half = 0; half < 2; half++) {
            const uint32_t word = simt::pack2<T>(value(tile, 2 * half), value(tile, 2 * half + 1));
            memcpy(own_rows + (g + 8 * half) * pitch<depth> + 8 * tile + 2 * t, &word, 4);
        }
    }
    __syncwarp();
    constexpr int chunks = depth / 8;
    for (int i = lane; i < 16 * chunks; i += simt::warp_size) {
        const int row = i / chunks, channel = i % chunks * 8;
        if (row < rows && channel < width)
            simt::store16(to + row * stride + channel,
                          simt::shared_load16(own_rows + row * pitch<depth> + channel));
    }
}
}  // namespace cosine
