// K1, a warp and its rows: who holds which elements, how they are read, summed, turned and written.
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
}  // namespace qk
