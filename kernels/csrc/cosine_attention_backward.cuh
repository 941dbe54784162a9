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
#include "cosine_attention_tile.cuh"

namespace cosine {
enum class Pass { both, queries, keys };

// Workspace; null where a pass does not need it
struct BackwardPartials {
    float* dq;     // [splits, batch * heads, queries, width]: sum_j dz_ij k^_j
    float* scale;  // [batch * heads, blocks of rows]: sums of t_i
    float* delta;  // [batch * heads, queries]
    float* dbias;  // [bias_groups, bias_batches, heads, queries, keys]
};

template <class T, int depth, int row_tiles>
struct BackwardMemory {
    static constexpr int rows = 16 * row_tiles;
    static constexpr int sum_pitch = depth + 4;
    static constexpr int dz_pitch = rows + 8;
    using Ring = KeyRing<T, depth>;
    static_assert(Ring::elements * sizeof(T) >= rows * sum_pitch * sizeof(float));

    alignas(128) T ring[Ring::elements];
    T q[rows * pitch<depth>], dout[rows * pitch<depth>];
    T dz[tile_keys * dz_pitch];  // [keys, rows], times 1 / |k|
    float key_length[tile_keys], key_exact[tile_keys];
    float row_length[rows], row_exact[rows];
    float lse[rows];  // base 2; infinite for rows that see nothing, whose probabilities are then 0
    float delta[rows];
    float turned[block_warps];  // sums of t_i
    Range seen[rows];
    // [rows, sum_pitch]: dq before its projection, once all tiles of keys are used
    __device__ float* sums() { return reinterpret_cast<float*>(ring); }
};

// Where one batch and head lies
struct Unit {
    int batch, head;
    float scale;
    const float* bias;
    float* dbias;
};

// Starts to copy a tile of rows and of dout
template <class T, int depth, int row_tiles>
__device__ __forceinline__ void fetch_rows(const Problem& p,
                                           BackwardMemory<T, depth, row_tiles>& memory,
                                           const Unit& unit, int first_row) {
    constexpr int rows = 16 * row_tiles;
    fetch_tile<T, depth, rows>(memory.q, rows_of<T>(p.q, p.q_strides, unit.batch, unit.head),
                               p.q_strides.row, first_row, p.queries, p.width);
    fetch_tile<T, depth, rows>(memory.dout,
                               rows_of<T>(p.dout, p.dout_strides, unit.batch, unit.head),
                               p.dout_strides.row, first_row, p.queries, p.width);
    tc::commit();
}

// delta of one row, by neighbouring lanes that share it
template <class T, int depth, int team>
__device__ __forceinline__ float product_with_out(const Problem& p, const T* dout, const Unit& unit,
                                                  int row, int member) {
    float sum = 0.0f;
    const MmtrainStrides strides = contiguous(p, p.queries);
    const T* out = rows_of<T>(p.out, strides, unit.batch, unit.head) + row * strides.row;
    for (int c = member; c < depth / 8; c += team) {
        if (row >= p.queries || 8 * c >= p.width) continue;
        const Words a = as_words(simt::load16(out + 8 * c));
        const Words b = as_words(simt::shared_load16(dout + 8 * c));
        for (int i = 0; i < 4; i++) {
            const float2 x = simt::unpack2<T>(a.at[i]), y = simt::unpack2<T>(b.at[i]);
            sum += x.x * y.x + x.y * y.y;
        }
    }
    return sum_over<team>(sum);
}

// Lengths, lse and delta of the rows that lie in shared memory
template <class T, int depth, int row_tiles, Pass pass>
__device__ __forceinline__ void describe_rows(const Problem& p, const BackwardPartials& partials,
                                              BackwardMemory<T, depth, row_tiles>& memory,
                                              const Unit& unit, int first_row) {
    constexpr int rows = 16 * row_tiles, team = block_threads / rows;
    measure_rows<T, depth, rows>(memory.q, memory.row_length, memory.row_exact, p.eps);
    const int local = threadIdx.x / team, member = threadIdx.x % team, row = first_row + local;
    const int64_t at =
        (static_cast<int64_t>(unit.batch) * p.heads + unit.head) * p.queries + row;
    float delta = 0.0f;
    if constexpr (pass == Pass::keys) {
        if (row < p.queries) delta = partials.delta[at];
    } else {
        delta = product_with_out<T, depth, team>(p, memory.dout + local * pitch<depth>, unit, row,
                                                 member);
        if (p.dlse && row < p.queries) delta -= p.dlse[at];
        if (pass == Pass::queries && member == 0 && row < p.queries) partials.delta[at] = delta;
    }
    if (member) return;
    const float lse = row < p.queries ? p.lse[at] : -infinity;
    memory.lse[local] = lse == -infinity ? infinity : lse * log2_e;
    memory.delta[local] = delta;
}

// Gradients of 16 keys of one warp: of the value, and of the direction before scale and projection
template <int depth>
struct KeySums {
    float dv[depth / 8][4], dk[depth / 8][4];
};
template <int depth>
__device__ __forceinline__ void clear(KeySums<depth>& sums) {
#pragma unroll
    for (int tile = 0; tile < depth / 8; tile++)
        for (int i = 0; i < 4; i++) sums.dv[tile][i] = sums.dk[tile][i] = 0.0f;
}

// 16 keys of this warp by 16 rows: x = a b^T of two pairs of tiles
template <class T, int depth>
__device__ __forceinline__ void products(float (&x)[2][4], const T* keys, const T* rows, int key,
                                         int row) {
    const int lane = threadIdx.x % simt::warp_size;
#pragma unroll
    for (int c = 0; c < depth / 16; c++) {
        uint32_t a[4], b[4];
        tc::load_tiles(a, operand<pitch<depth>>(keys, key, 16 * c, lane));
        tc::load_tiles(b, operand_of_rows<pitch<depth>>(rows, row, 16 * c, lane));
        tc::multiply<T>(x[0], a, b[0], b[1]);
        tc::multiply<T>(x[1], a, b[2], b[3]);
    }
}

// sums[16 keys, depth] += left[16 keys, 16 rows] rows[16 rows, depth]
template <class T, int depth>
__device__ __forceinline__ void add_products(float (&sums)[depth / 8][4], const uint32_t (&left)[4],
                                             const T* rows, int row) {
    const int lane = threadIdx.x % simt::warp_size;
#pragma unroll
    for (int c = 0; c < depth / 16; c++) {
        uint32_t b[4];
        tc::load_tiles_transposed(b, operand<pitch<depth>>(rows, row, 16 * c, lane));
        tc::multiply<T>(sums[2 * c], left, b[0], b[1]);
        tc::multiply<T>(sums[2 * c + 1], left, b[2], b[3]);
    }
}

// One warp's 16 keys and 16 rows from `row` of the tile: adds to dv, dk and dbias, leaves dz / |k|
// in shared memory for dq
template <class T, int depth, int row_tiles, Pass pass>
__device__ __forceinline__ void differentiate(const Problem& p,
                                              BackwardMemory<T, depth, row_tiles>& memory,
                                              const Unit& unit, KeySums<depth>& sums,
                                              const T* k_tile, const T* v_tile, int first_key,
                                              int first_row, int row, bool whole) {
    using Memory = BackwardMemory<T, depth, row_tiles>;
    const int lane = threadIdx.x % simt::warp_size, g = lane / 4, t = lane % 4;
    const int key = threadIdx.x / simt::warp_size * 16;
    float z[2][4] = {}, dz[2][4] = {};
    products<T, depth>(z, k_tile, memory.q, key, row);
    products<T, depth>(dz, v_tile, memory.dout, key, row);
    uint32_t probabilities[4], for_keys[4];
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int column = key + g + 8 * half, at = first_key + column;
            const int local = row + 8 * tile + 2 * t;  // and its neighbour
            float e[2], d[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const Range seen = memory.seen[local + i];
                e[i] = d[i] = 0.0f;
                if (!whole && (at < seen.begin || at >= seen.end)) continue;
                const int64_t entry = static_cast<int64_t>(first_row + local + i) * p.keys + at;
                float logit = z[tile][2 * half + i] * memory.key_length[column] *
                              (unit.scale * log2_e * memory.row_length[local + i]);
                if (unit.bias) logit += unit.bias[entry] * log2_e;
                e[i] = simt::exp2_approx(logit - memory.lse[local + i]);
                d[i] = e[i] * (dz[tile][2 * half + i] - memory.delta[local + i]);
                if (pass != Pass::queries && unit.dbias) unit.dbias[entry] += d[i];
            }
            probabilities[2 * tile + half] = simt::pack2<T>(e[0], e[1]);
            for_keys[2 * tile + half] = simt::pack2<T>(d[0] * memory.row_length[local],
                                                       d[1] * memory.row_length[local + 1]);
            if constexpr (pass != Pass::keys) {
                const float length = memory.key_length[column];
                const uint32_t for_rows = simt::pack2<T>(d[0] * length, d[1] * length);
                memcpy(memory.dz + column * Memory::dz_pitch + local, &for_rows, 4);
            }
        }
    }
    if constexpr (pass != Pass::queries) {
        add_products<T, depth>(sums.dv, probabilities, memory.dout, row);
        add_products<T, depth>(sums.dk, for_keys, memory.q, row);
    }
}

// One warp's part of dq before scale and projection: 16 rows, every `stride`-th 16 channels
template <int depth, int row_tiles>
struct RowGradient {
    static constexpr int stride = block_warps / row_tiles;
    static constexpr int pieces = (depth / 16 + stride - 1) / stride;
    float sums[pieces][2][4];
};
template <int depth, int row_tiles>
__device__ __forceinline__ void clear(RowGradient<depth, row_tiles>& gradient) {
    for (auto& piece : gradient.sums)
        for (auto& tile : piece)
            for (float& x : tile) x = 0.0f;
}

template <class T, int depth, int row_tiles>
__device__ __forceinline__ void add_to_rows(BackwardMemory<T, depth, row_tiles>& memory,
                                            RowGradient<depth, row_tiles>& gradient,
                                            const T* k_tile) {
    using Memory = BackwardMemory<T, depth, row_tiles>;
    using Gradient = RowGradient<depth, row_tiles>;
    const int lane = threadIdx.x % simt::warp_size, warp = threadIdx.x / simt::warp_size;
    const int row = warp % row_tiles * 16, part = warp / row_tiles;
#pragma unroll
    for (int key = 0; key < tile_keys; key += 16) {
        uint32_t a[4];  // lies transposed: the tile's rows are keys
        tc::load_tiles_transposed(a, operand_of_rows<Memory::dz_pitch>(memory.dz, key, row, lane));
#pragma unroll
        for (int piece = 0; piece < Gradient::pieces; piece++) {
            const int c = part + piece * Gradient::stride;
            if (c >= depth / 16) continue;
            uint32_t b[4];
            tc::load_tiles_transposed(b, operand<pitch<depth>>(k_tile, key, 16 * c, lane));
            tc::multiply<T>(gradient.sums[piece][0], a, b[0], b[1]);
            tc::multiply<T>(gradient.sums[piece][1], a, b[2], b[3]);
        }
    }
}

template <class T, int depth, int row_tiles>
__device__ __forceinline__ void lay_down(BackwardMemory<T, depth, row_tiles>& memory,
                                         const RowGradient<depth, row_tiles>& gradient) {
    using Memory = BackwardMemory<T, depth, row_tiles>;
    using Gradient = RowGradient<depth, row_tiles>;
    const int lane = threadIdx.x % simt::warp_size, warp = threadIdx.x / simt::warp_size;
    const int row = warp % row_tiles * 16 + lane / 4, part = warp / row_tiles, t = lane % 4;
#pragma unroll
    for (int piece = 0; piece < Gradient::pieces; piece++) {
        const int c = part + piece * Gradient::stride;
        if (c >= depth / 16) continue;
        for (int tile = 0; tile < 2; tile++)
            for (int i = 0; i < 4; i++)
                memory.sums()[(row + i / 2 * 8) * Memory::sum_pitch + 16 * c + 8 * tile + 2 * t +
                              i % 2] = gradient.sums[piece][tile][i];
    }
}

// Gradient of one query row from that of its direction, by one warp; gives t = q^.dq^.
// A lane holds two neighbouring channels of every 64.
template <class T>
__device__ __forceinline__ float project_row(const T* q, const float2 (&direction)[2], T* dq,
                                             int width, float eps) {
    const int lane = threadIdx.x % simt::warp_size;
    float2 x[2];
    float squares = 0.0f, product = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int channel = 2 * lane + 64 * i;
        x[i] = make_float2(0.0f, 0.0f);
        if (channel < width) x[i] = simt::unpack2<T>(simt::load4(q + channel));
        squares += x[i].x * x[i].x + x[i].y * x[i].y;
        product += x[i].x * direction[i].x + x[i].y * direction[i].y;
    }
    const float reciprocal = 1.0f / fmaxf(sqrtf(sum_over<32>(squares)), eps);
    const float turned = reciprocal * sum_over<32>(product);
    const float along = longer_than_eps(reciprocal, eps) ? reciprocal * turned : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int channel = 2 * lane + 64 * i;
        if (channel < width)
            simt::store4(dq + channel,
                         simt::pack2<T>(reciprocal * (direction[i].x - x[i].x * along),
                                        reciprocal * (direction[i].y - x[i].y * along)));
    }
    return turned;
}

// Projects rows [first_row, first_row + rows) and sums t. sum_at(row, channel) is the sum of
// dz k^ over all keys, for two channels.
template <class T, int rows, class SumAt>
__device__ __forceinline__ void project_rows(const Problem& p, const BackwardPartials& partials,
                                             const Unit& unit, int first_row, float* turned,
                                             SumAt sum_at) {
    const int lane = threadIdx.x % simt::warp_size, warp = threadIdx.x / simt::warp_size;
    const T* q = rows_of<T>(p.q, p.q_strides, unit.batch, unit.head);
    const MmtrainStrides strides = contiguous(p, p.queries);
    T* dq = rows_of<T>(p.dq, strides, unit.batch, unit.head);
    float sum = 0.0f;
    for (int local = warp; local < rows && first_row + local < p.queries; local += block_warps) {
        const int row = first_row + local;
        float2 direction[2];
        for (int i = 0; i < 2; i++) {
            const int channel = 2 * lane + 64 * i;
            direction[i] = make_float2(0.0f, 0.0f);
            if (channel < p.width) direction[i] = sum_at(local, channel);
            direction[i].x *= unit.scale;
            direction[i].y *= unit.scale;
        }
        sum += project_row<T>(q + row * p.q_strides.row, direction, dq + row * strides.row, p.width,
                              p.eps);
    }
    if (lane == 0) turned[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        const int blocks = tiles_for(p.queries, rows), block = first_row / rows;
        partials.scale[(static_cast<int64_t>(unit.batch) * p.heads + unit.head) * blocks + block] =
            turned[0] + turned[1] + turned[2] + turned[3];
    }
}

// dk of one warp's 16 keys: scaled, projected, stored in place of the keys, then dv of the values
template <class T, int depth, int row_tiles>
__device__ __forceinline__ void store_key_gradients(const Problem& p,
                                                    BackwardMemory<T, depth, row_tiles>& memory,
                                                    const Unit& unit, const KeySums<depth>& sums,
                                                    T* k_tile, T* v_tile, int first_key) {
    const int lane = threadIdx.x % simt::warp_size, g = lane / 4, t = lane % 4;
    const int key = threadIdx.x / simt::warp_size * 16;
    T* own_keys = k_tile + key * pitch<depth>;
    float along[2], outer[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int column = key + g + 8 * half;
        const float length = memory.key_length[column];
        float product = 0.0f;
#pragma unroll
        for (int tile = 0; tile < depth / 8; tile++) {
            const T* x = own_keys + (g + 8 * half) * pitch<depth> + 8 * tile + 2 * t;
            product += simt::to_float(x[0]) * sums.dk[tile][2 * half] +
                       simt::to_float(x[1]) * sums.dk[tile][2 * half + 1];
        }
        const bool projected = longer_than_eps(memory.key_exact[column], p.eps);
        along[half] = projected ? sum_over<4>(product) * length * length : sum_over<4>(product) * 0;
        outer[half] = memory.key_exact[column] * unit.scale;
    }
    const MmtrainStrides strides = contiguous(p, p.keys);
    const int64_t to = static_cast<int64_t>(first_key + key) * strides.row;
    const int left = p.keys - first_key - key;
    store_rows<T, depth>(own_keys, rows_of<T>(p.dk, strides, unit.batch, unit.head) + to,
                         strides.row, left, p.width, [&](int tile, int i) {
                             // read before this lane's own pair is overwritten: one pair at a time
                             const T* x = own_keys + (g + i / 2 * 8) * pitch<depth> + 8 * tile + 2 * t;
                             return outer[i / 2] * (sums.dk[tile][i] -
                                                    simt::to_float(x[i % 2]) * along[i / 2]);
                         });
    store_rows<T, depth>(v_tile + key * pitch<depth>,
                         rows_of<T>(p.dv, strides, unit.batch, unit.head) + to, strides.row, left,
                         p.width, [&](int tile, int i) { return sums.dv[tile][i]; });
}

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
