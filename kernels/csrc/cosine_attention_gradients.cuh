// Pieces of the backward pass of cosine attention (see cosine_attention_backward.cuh): what a block
// does with one tile of rows and one tile of keys, and with sums that are complete.
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
}  // namespace cosine
