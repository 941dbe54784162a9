// K1, the kernels: RMS, layer or L2 norm of every head, then the rotary embedding by a table.
//
// Memory bound: 4 bytes an element forward and 6 backward in 16 bits, each tensor once.
// A warp owns a token (or a part of its heads) and keeps the token's cosines and sines in registers
// while it walks the heads. A lane holds V elements of each half of a row, so both partners of a
// rotary pair, halves or neighbours, lie in one lane and rotation needs no shuffle; a row takes
// D / 2V lanes, a warp 32 / (D / 2V) rows at once. V is 8 where 16 divides D (16-byte accesses in 16
// bits), else 4.
//
// Formulas: x^ = (x - mean) r, n = weight x^ + bias (or scale_h x^), y = rotated n; backward
// g = weight * unrotated dy, dx = r (g - mean(g) - x^ mean(g x^)), sums instead of means and no
// mean(g) for L2, r g where an L2 norm was held at eps.
// Gradients of weights and scales: registers or shared memory of a warp, then one row a block, then
// a second kernel that sums the rows. No atomics: the same bits every time.
#pragma once
#include "qk_norm_rope.h"
#include "simt.h"

namespace qk {
constexpr int threads = 256;
constexpr int warps = threads / simt::warp_size;

// Kernels are compiled apart for norms with and without a mean; which of the others runs is a
// uniform branch
enum Statistic { no_mean, with_mean };

// Which blocks work on which side, and how many parts the heads of a token are cut into
struct Division {
    int blocks[2];
    int parts[2];
    int row;  // floats of a block's row of partial sums
};

// A lane's place: row `group` of the rows that a warp has at once, elements V sub and D / 2 + V sub
struct Lane {
    int index, lanes, group, sub, rows;
    bool active;

    __device__ __forceinline__ Lane(int lanes_) : lanes(lanes_) {
        index = threadIdx.x % simt::warp_size;
        group = index / lanes;
        sub = index % lanes;
        rows = simt::warp_size / lanes;
        active = group < rows;
    }
};

template <class T, int V>
struct Pack {
    static constexpr int words = V * static_cast<int>(sizeof(T)) / 4;
    uint32_t word[words];

    __device__ __forceinline__ void load(const T* p) {
        if constexpr (words == 2) {
            const uint2 a = simt::load8(p);
            word[0] = a.x, word[1] = a.y;
        } else {
#pragma unroll
            for (int i = 0; i < words; i += 4) {
                const uint4 a = simt::load16(reinterpret_cast<const uint32_t*>(p) + i);
                word[i] = a.x, word[i + 1] = a.y, word[i + 2] = a.z, word[i + 3] = a.w;
            }
        }
    }
    __device__ __forceinline__ void store(T* p) const {
        if constexpr (words == 2) {
            simt::store8(p, make_uint2(word[0], word[1]));
        } else {
#pragma unroll
            for (int i = 0; i < words; i += 4)
                simt::store16(reinterpret_cast<uint32_t*>(p) + i,
                              make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]));
        }
    }
    __device__ __forceinline__ void unpack(float* x) const {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < V; i++) x[i] = simt::bits_as_float(word[i]);
        } else {
#pragma unroll
            for (int i = 0; i < V / 2; i++) {
                const float2 pair = simt::unpack2<T>(word[i]);
                x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
            }
        }
    }
    __device__ __forceinline__ void pack(const float* x) {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < V; i++) word[i] = simt::float_as_bits(x[i]);
        } else {
#pragma unroll
            for (int i = 0; i < V / 2; i++) word[i] = simt::pack2<T>(x[2 * i], x[2 * i + 1]);
        }
    }
};

// What a lane holds of a row: V elements of the first half, V of the second
template <int V>
struct Halves {
    float low[V], high[V];

    __device__ __forceinline__ void fill(float value) {
#pragma unroll
        for (int i = 0; i < V; i++) low[i] = high[i] = value;
    }
    __device__ __forceinline__ float sum() const {
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < V; i++) total += low[i] + high[i];
        return total;
    }
    __device__ __forceinline__ float dot(const Halves& other) const {
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < V; i++)
            total += low[i] * other.low[i] + high[i] * other.high[i];
        return total;
    }
};

template <class T, int V>
struct RawRow {
    Pack<T, V> low, high;

    // Zeros for lanes without a row, so that they add nothing
    __device__ __forceinline__ void load(const T* row, const Lane& lane, bool active) {
#pragma unroll
        for (int i = 0; i < Pack<T, V>::words; i++) low.word[i] = high.word[i] = 0u;
        if (!active) return;
        low.load(row + V * lane.sub);
        high.load(row + V * (lane.lanes + lane.sub));
    }
    __device__ __forceinline__ Halves<V> unpack() const {
        Halves<V> x;
        low.unpack(x.low);
        high.unpack(x.high);
        return x;
    }
};

template <class T, int V>
__device__ __forceinline__ void store_row(const Halves<V>& x, T* row, const Lane& lane) {
    Pack<T, V> pack;
    pack.pack(x.low);
    pack.store(row + V * lane.sub);
    pack.pack(x.high);
    pack.store(row + V * (lane.lanes + lane.sub));
}

// Sum over the lanes of a row, the same bits in each; any number of lanes
template <int LANES>
__device__ __forceinline__ float row_sum(float x, const Lane& lane) {
    const int lanes = LANES ? LANES : lane.lanes;
    if ((lanes & (lanes - 1)) == 0) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
            if (step < lanes) x += __shfl_xor_sync(simt::full_mask, x, step);
        return x;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {  // fold what lies beyond `step` onto the lanes below
        if (step >= lanes) continue;
        const float other = __shfl_sync(simt::full_mask, x, (lane.index + step) % simt::warp_size);
        if (lane.sub < step && lane.sub + step < lanes) x += other;
    }
    const int first = lane.active ? lane.index - lane.sub : lane.index;
    return __shfl_sync(simt::full_mask, x, first);
}

__device__ __forceinline__ float load_parameter(const void* p, int type, int64_t i) {
    if (type == MMTRAIN_FLOAT32) return static_cast<const float*>(p)[i];
    if (type == MMTRAIN_BFLOAT16) return simt::to_float(static_cast<const simt::bf16*>(p)[i]);
    return simt::to_float(static_cast<const simt::fp16*>(p)[i]);
}

__device__ __forceinline__ void store_parameter(void* p, int type, int64_t i, float x) {
    if (type == MMTRAIN_FLOAT32) static_cast<float*>(p)[i] = x;
    if (type == MMTRAIN_BFLOAT16) static_cast<simt::bf16*>(p)[i] = simt::from_float<simt::bf16>(x);
    if (type == MMTRAIN_FLOAT16) static_cast<simt::fp16*>(p)[i] = simt::from_float<simt::fp16>(x);
}

template <class T, int V>
__device__ __forceinline__ void load_vector_of(Halves<V>& x, const void* p, const Lane& lane) {
    const T* low = static_cast<const T*>(p) + V * lane.sub;
    const T* high = low + V * lane.lanes;
#pragma unroll
    for (int i = 0; i < V; i++) x.low[i] = simt::to_float(low[i]), x.high[i] = simt::to_float(high[i]);
}

// The type is asked once, not at every element: so all loads are on their way at once
template <int V>
__device__ __forceinline__ void load_vector(Halves<V>& x, const void* p, int type,
                                            const Lane& lane) {
    if (!p || !lane.active) return;
    if (type == MMTRAIN_FLOAT32) load_vector_of<float>(x, p, lane);
    if (type == MMTRAIN_BFLOAT16) load_vector_of<simt::bf16>(x, p, lane);
    if (type == MMTRAIN_FLOAT16) load_vector_of<simt::fp16>(x, p, lane);
}

// Cosines and sines of a lane's pairs. Halves: pair i is (low[i], high[i]). Neighbours: the first
// V / 2 angles turn pairs of `low`, the others pairs of `high`.
template <int V, int PAIRING>
struct Angles {
    float c[V], s[V];

    __device__ __forceinline__ void load(const MmtrainQkNormRope& p, int64_t token,
                                         const Lane& lane) {
        if (PAIRING == MMTRAIN_PAIR_NONE || !lane.active) return;
        const int64_t row = !p.positions          ? token % p.table_rows
                            : p.position_bytes == 4 ? static_cast<const int32_t*>(p.positions)[token]
                                                    : static_cast<const int64_t*>(p.positions)[token];
        const int half = V * lane.lanes;
        constexpr int run = PAIRING == MMTRAIN_PAIR_HALVES ? V : V / 2;
#pragma unroll
        for (int i = 0; i < V; i += run) {
            const int64_t offset = row * half + (i ? half / 2 : 0) + run * lane.sub;
            load_run<run>(c + i, p.cosine + offset);
            load_run<run>(s + i, p.sine + offset);
        }
    }

    template <int N>
    static __device__ __forceinline__ void load_run(float* to, const float* from) {
        if constexpr (N == 2) {
            const float2 a = *reinterpret_cast<const float2*>(from);
            to[0] = a.x, to[1] = a.y;
        } else {
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                const float4 a = *reinterpret_cast<const float4*>(from + i);
                to[i] = a.x, to[i + 1] = a.y, to[i + 2] = a.z, to[i + 3] = a.w;
            }
        }
    }

    // `sign` 1 turns by the angles, -1 back
    __device__ __forceinline__ void turn(Halves<V>& x, float sign) const {
        if constexpr (PAIRING == MMTRAIN_PAIR_HALVES) {
#pragma unroll
            for (int i = 0; i < V; i++) turn_pair(x.low[i], x.high[i], c[i], sign * s[i]);
        }
        if constexpr (PAIRING == MMTRAIN_PAIR_NEIGHBOURS) {
#pragma unroll
            for (int i = 0; i < V / 2; i++) {
                turn_pair(x.low[2 * i], x.low[2 * i + 1], c[i], sign * s[i]);
                turn_pair(x.high[2 * i], x.high[2 * i + 1], c[V / 2 + i], sign * s[V / 2 + i]);
            }
        }
    }

    static __device__ __forceinline__ void turn_pair(float& a, float& b, float cosine,
                                                     float sine) {
        const float first = a * cosine - b * sine;
        b = b * cosine + a * sine;
        a = first;
    }
};

// The heads that one warp walks for one token, unit after unit
struct Unit {
    int64_t token;
    int begin, end;
};

// Walks the units of this warp; the side is that of its block
struct Walk {
    int side, part_heads;
    int64_t next, stride, stop;
    int parts, heads;

    __device__ __forceinline__ Walk(const MmtrainQkNormRope& p, const Division& d,
                                    const Lane& lane) {
        const int block = blockIdx.x;
        side = block >= d.blocks[0];
        parts = side ? d.parts[1] : d.parts[0];  // no index: that would copy `d` to memory
        heads = static_cast<int>(p.side[side].heads);
        const int chunks = (heads + lane.rows - 1) / lane.rows;
        part_heads = (chunks + parts - 1) / parts * lane.rows;
        next = static_cast<int64_t>(block - (side ? d.blocks[0] : 0)) * warps +
               threadIdx.x / simt::warp_size;
        stride = static_cast<int64_t>(side ? d.blocks[1] : d.blocks[0]) * warps;
        stop = p.tokens * parts;
    }
    __device__ __forceinline__ bool take(Unit& unit) {
        if (next >= stop) return false;
        unit.token = next / parts;
        unit.begin = static_cast<int>(next % parts) * part_heads;
        unit.end = min(unit.begin + part_heads, heads);
        next += stride;
        return true;
    }
};

template <class T>
__device__ __forceinline__ T* row_of(const MmtrainRows& rows, int64_t token, int head) {
    return static_cast<T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

// --- Forward ------------------------------------------------------------------------------------

// Normalises a row in place; returns its reciprocal norm
template <int V, int LANES, int STATISTIC>
__device__ __forceinline__ float normalise(Halves<V>& x, float& mean, const MmtrainQkNormRope& p,
                                           const Halves<V>& weight, const Halves<V>& bias,
                                           float scale, const Lane& lane) {
    const float share = 1.f / static_cast<float>(2 * V * (LANES ? LANES : lane.lanes));
    if constexpr (STATISTIC == with_mean) {
        mean = row_sum<LANES>(x.sum(), lane) * share;
#pragma unroll
        for (int i = 0; i < V; i++) x.low[i] -= mean, x.high[i] -= mean;
    } else if (p.norm == MMTRAIN_NORM_NONE) {
        return 1.f;
    }
    const float square = row_sum<LANES>(x.dot(x), lane);
    const float inverse = p.norm == MMTRAIN_NORM_L2 ? 1.f / fmaxf(sqrtf(square), p.eps)
                                                    : rsqrtf(square * share + p.eps);
#pragma unroll
    for (int i = 0; i < V; i++) {
        x.low[i] = x.low[i] * (inverse * scale) * weight.low[i];
        x.high[i] = x.high[i] * (inverse * scale) * weight.high[i];
        if constexpr (STATISTIC == with_mean) x.low[i] += bias.low[i], x.high[i] += bias.high[i];
    }
    return inverse;
}

template <class T, int V, int LANES, int STATISTIC, int PAIRING>
__global__ void __launch_bounds__(threads, 2)
    forward_kernel(const MmtrainQkNormRope p, const Division division) {
    // rows whose loads are in flight at once: 16 KB a block at least, whatever the width
    constexpr int depth = 8 / Pack<T, V>::words > 0 ? 8 / Pack<T, V>::words : 1;
    const Lane lane(LANES ? LANES : p.width / (2 * V));
    Walk walk(p, division, lane);
    const MmtrainQkSide& side = p.side[walk.side];
    Halves<V> weight, bias;
    weight.fill(1.f);
    bias.fill(0.f);
    load_vector(weight, side.weight, p.parameter, lane);
    load_vector(bias, side.bias, p.parameter, lane);
    Unit unit;
    while (walk.take(unit)) {
        Angles<V, PAIRING> angles;
        angles.load(p, unit.token, lane);
        for (int first = unit.begin; first < unit.end; first += depth * lane.rows) {
            RawRow<T, V> raw[depth];
#pragma unroll
            for (int i = 0; i < depth; i++) {
                const int head = first + i * lane.rows + lane.group;
                raw[i].load(row_of<const T>(side.x, unit.token, head), lane,
                            lane.active && head < unit.end);
            }
#pragma unroll
            for (int i = 0; i < depth; i++) {
                if (first + i * lane.rows >= unit.end) break;
                const int head = first + i * lane.rows + lane.group;
                const bool active = lane.active && head < unit.end;
                const float scale =
                    active && side.scale ? load_parameter(side.scale, p.parameter, head) : 1.f;
                Halves<V> x = raw[i].unpack();
                float mean = 0.f;
                const float inverse = normalise<V, LANES, STATISTIC>(x, mean, p, weight, bias,
                                                                     scale, lane);
                angles.turn(x, 1.f);
                if (!active) continue;
                store_row(x, row_of<T>(side.y, unit.token, head), lane);
                if (lane.sub != 0) continue;
                const int64_t row = unit.token * side.heads + head;
                if (side.inverse) side.inverse[row] = inverse;
                if (STATISTIC == with_mean && side.mean) side.mean[row] = mean;
            }
        }
    }
}

// --- Backward -----------------------------------------------------------------------------------

// The gradient of a row: `x` becomes x^, `g` the gradient of x; adds to those of weight and bias.
// Returns the row's share of the gradient of its scale.
template <int V, int LANES, int STATISTIC>
__device__ __forceinline__ float differentiate(Halves<V>& x, Halves<V>& g, float inverse,
                                               float mean, float scale,
                                               const MmtrainQkNormRope& p,
                                               const Halves<V>& weight, Halves<V>& d_weight,
                                               Halves<V>& d_bias, const Lane& lane) {
    if (STATISTIC == no_mean && p.norm == MMTRAIN_NORM_NONE) return 0.f;
#pragma unroll
    for (int i = 0; i < V; i++) {
        x.low[i] = (x.low[i] - mean) * inverse, x.high[i] = (x.high[i] - mean) * inverse;
        d_weight.low[i] += g.low[i] * x.low[i], d_weight.high[i] += g.high[i] * x.high[i];
        if constexpr (STATISTIC == with_mean) d_bias.low[i] += g.low[i], d_bias.high[i] += g.high[i];
        g.low[i] *= weight.low[i], g.high[i] *= weight.high[i];
    }
    const float along = row_sum<LANES>(g.dot(x), lane);
    const bool l2 = STATISTIC == no_mean && p.norm == MMTRAIN_NORM_L2;
    const float share = l2 ? 1.f : 1.f / static_cast<float>(2 * V * (LANES ? LANES : lane.lanes));
    // F.normalize divides rows no longer than eps by eps: they are not projected
    const float project = l2 && inverse >= 1.f / p.eps ? 0.f : along * share;
    const float level = STATISTIC == with_mean ? row_sum<LANES>(g.sum(), lane) * share : 0.f;
    const float factor = inverse * scale;
#pragma unroll
    for (int i = 0; i < V; i++) {
        g.low[i] = factor * (g.low[i] - level - x.low[i] * project);
        g.high[i] = factor * (g.high[i] - level - x.high[i] * project);
    }
    return along;
}

// Sums what the rows of a block's warps gathered for weight and bias into the block's row
template <int V>
__device__ __forceinline__ void reduce_vectors(const Halves<V>& d_weight, const Halves<V>& d_bias,
                                               float* shared, float* row, const Lane& lane) {
    const int width = 2 * V * lane.lanes, half = V * lane.lanes;
    if (lane.active) {
        const int warp = threadIdx.x / simt::warp_size;
        float* mine = shared + (warp * lane.rows + lane.group) * 2 * width + V * lane.sub;
#pragma unroll
        for (int i = 0; i < V; i++) {
            mine[i] = d_weight.low[i], mine[half + i] = d_weight.high[i];
            mine[width + i] = d_bias.low[i], mine[width + half + i] = d_bias.high[i];
        }
    }
    __syncthreads();
    for (int column = threadIdx.x; column < 2 * width; column += threads) {
        float total = 0.f;
        for (int i = 0; i < warps * lane.rows; i++) total += shared[i * 2 * width + column];
        row[column] = total;
    }
}

// The same for the scales of the heads, which every warp gathered in its own part of `shared`
__device__ __forceinline__ void reduce_scales(const float* shared, int heads, float* row) {
    __syncthreads();
    for (int head = threadIdx.x; head < heads; head += threads) {
        float total = 0.f;
        for (int warp = 0; warp < warps; warp++) total += shared[warp * heads + head];
        row[head] = total;
    }
}

// The general ones with a mean and V = 8 would spill 20 to 36 bytes in 128 registers
template <class T, int V, int LANES, int STATISTIC, int PAIRING>
__global__ void __launch_bounds__(threads, LANES == 0 && STATISTIC == with_mean ? 1 : 2)
    backward_kernel(const MmtrainQkNormRope p, const Division division, float* partial) {
    constexpr int depth = 4 / Pack<T, V>::words > 0 ? 4 / Pack<T, V>::words : 1;
    SIMT_DYNAMIC_SHARED(float, shared);
    const Lane lane(LANES ? LANES : p.width / (2 * V));
    Walk walk(p, division, lane);
    const MmtrainQkSide& side = p.side[walk.side];
    float* scales = shared + threadIdx.x / simt::warp_size * walk.heads;
    if (side.d_scale) {
        for (int head = lane.index; head < walk.heads; head += simt::warp_size) scales[head] = 0.f;
        __syncwarp();
    }
    Halves<V> weight, d_weight, d_bias;
    weight.fill(1.f);
    d_weight.fill(0.f);
    d_bias.fill(0.f);
    load_vector(weight, side.weight, p.parameter, lane);
    Unit unit;
    while (walk.take(unit)) {
        Angles<V, PAIRING> angles;
        angles.load(p, unit.token, lane);
        for (int first = unit.begin; first < unit.end; first += depth * lane.rows) {
            RawRow<T, V> raw[depth], upstream[depth];
#pragma unroll
            for (int i = 0; i < depth; i++) {
                const int head = first + i * lane.rows + lane.group;
                const bool active = lane.active && head < unit.end;
                raw[i].load(row_of<const T>(side.x, unit.token, head), lane, active);
                upstream[i].load(row_of<const T>(side.dy, unit.token, head), lane, active);
            }
#pragma unroll
            for (int i = 0; i < depth; i++) {
                if (first + i * lane.rows >= unit.end) break;
                const int head = first + i * lane.rows + lane.group;
                const bool active = lane.active && head < unit.end;
                const int64_t row = unit.token * side.heads + head;
                const float scale =
                    active && side.scale ? load_parameter(side.scale, p.parameter, head) : 1.f;
                const float inverse = active && side.inverse ? side.inverse[row] : 0.f;
                const float mean =
                    STATISTIC == with_mean && active ? side.mean[row] : 0.f;
                Halves<V> x = raw[i].unpack(), g = upstream[i].unpack();
                angles.turn(g, -1.f);
                const float along = differentiate<V, LANES, STATISTIC>(
                    x, g, inverse, mean, scale, p, weight, d_weight, d_bias, lane);
                if (active) store_row(g, row_of<T>(side.dx, unit.token, head), lane);
                if (!side.d_scale) continue;
                if (active && lane.sub == 0) scales[head] += along;
                __syncwarp();  // another group may come to this head next
            }
        }
    }
    float* row = partial + static_cast<int64_t>(blockIdx.x) * division.row;
    if (side.d_scale) reduce_scales(shared, walk.heads, row);
    if (side.d_weight) reduce_vectors(d_weight, d_bias, shared, row, lane);
}

// Sums the blocks' rows: 32 columns a block, 8 threads a column, always in the same order
inline __global__ void __launch_bounds__(threads)
    sum_partials_kernel(const MmtrainQkNormRope p, const Division division, const float* partial) {
    SIMT_SHARED(float, sums, threads);
    const MmtrainQkSide& side = p.side[blockIdx.y];
    const int lane = threadIdx.x % simt::warp_size, warp = threadIdx.x / simt::warp_size;
    const int column = blockIdx.x * simt::warp_size + lane;
    const int columns = side.d_scale ? static_cast<int>(side.heads) : side.d_weight ? 2 * p.width : 0;
    const int begin = blockIdx.y ? division.blocks[0] : 0, end = begin + division.blocks[blockIdx.y];
    float total = 0.f;
    if (column < columns)
        for (int block = begin + warp; block < end; block += warps)
            total += partial[static_cast<int64_t>(block) * division.row + column];
    sums[threadIdx.x] = total;
    __syncthreads();
    if (warp != 0 || column >= columns) return;
    for (int i = 1; i < warps; i++) total += sums[i * simt::warp_size + lane];
    if (side.d_scale) {
        store_parameter(side.d_scale, p.parameter, column, total);
    } else if (column < p.width) {
        store_parameter(side.d_weight, p.parameter, column, total);
    } else if (side.d_bias) {
        store_parameter(side.d_bias, p.parameter, column - p.width, total);
    }
}
}  // namespace qk
