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
#include "qk_norm_rope_row.cuh"

namespace qk {
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
