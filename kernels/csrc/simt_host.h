// The host side of simt.h: what kernels call, on the fibers of simt_fibers.h.
#pragma once
#include "simt_fibers.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- Threads of a block and lanes of a warp -----------------------------------------------------

inline void __syncthreads() {
    using namespace simt::host;
    arrive_and_wait(barriers[0], block_size.x * block_size.y * block_size.z);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    using namespace simt::host;
    Warp& warp = warps[current->number / simt::warp_size];
    if (!(mask >> (current->number % simt::warp_size) & 1)) fail("a lane outside its own mask");
    Barrier& barrier = mask == simt::full_mask ? warp.full : warp.parts[mask];
    arrive_and_wait(barrier, __builtin_popcount(mask));
}

namespace simt::host {
// What `source` brought to this exchange; every lane of `mask` must come with the same mask
inline uint64_t exchange(unsigned mask, uint64_t value, int source) {
    Warp& warp = warps[current->number / warp_size];
    const int lane = current->number % warp_size;
    warp.slots[lane] = value;
    warp.masks[lane] = mask;
    __syncwarp(mask);
    if (!(mask >> source & 1)) fail("shuffle from inactive lane %d (mask %08x)", source, mask);
    if (warp.masks[source] != mask)
        fail("lanes %d and %d shuffle with masks %08x and %08x", lane, source, mask,
             warp.masks[source]);
    const uint64_t result = warp.slots[source];
    __syncwarp(mask);
    return result;
}
}  // namespace simt::host

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    static_assert(sizeof(T) <= 8);
    const int lane = simt::host::current->number % simt::warp_size;
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    word = simt::host::exchange(mask, word, (lane & ~(width - 1)) | (source & (width - 1)));
    T result;
    memcpy(&result, &word, sizeof(T));
    return result;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = simt::host::current->number % simt::warp_size;
    const int source = lane ^ bits;  // beyond the own segment: the own value, as on a GPU
    const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
    return __shfl_sync(mask, value, inside ? source : lane, 32);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
    const int lane = simt::host::current->number % simt::warp_size;
    const bool inside = (lane & (width - 1)) + delta < width;
    return __shfl_sync(mask, value, inside ? lane + delta : lane, 32);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
    const int lane = simt::host::current->number % simt::warp_size;
    const bool inside = (lane & (width - 1)) >= delta;
    return __shfl_sync(mask, value, inside ? lane - delta : lane, 32);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned result = 0;
    for (int lane = 0; lane < simt::warp_size; lane++)
        if (mask >> lane & 1)
            result |= (__shfl_sync(mask, predicate, lane) ? 1u : 0u) << lane;
    return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == mask;
}

// Fibers never run at the same time, so a plain sum is atomic
template <class T>
inline T atomicAdd(T* p, T value) {
    const T before = *p;
    *p = before + value;
    return before;
}

template <class T>
inline T __ldg(const T* p) {
    return *p;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace simt {
inline float bits_as_float(uint32_t word) {
    float x;
    memcpy(&x, &word, 4);
    return x;
}
inline uint32_t float_as_bits(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    return word;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return bits_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // the exponent is moved by a product, which also makes subnormal numbers normal
    return bits_as_float(sign | float_as_bits(bits_as_float(rest << 13) * 0x1p112f));
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
    uint32_t word = float_as_bits(x);
    if ((word & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    word += 0x7fffu + (word >> 16 & 1);
    return {static_cast<uint16_t>(word >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
    const uint32_t word = float_as_bits(x), size = word & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>(word >> 16 & 0x8000u);
    if (size > 0x7f800000u) return {0x7fff};
    if (size >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
    if (size < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded bits at the low end
        const uint32_t low = float_as_bits(bits_as_float(size) + 0.5f) - 0x3f000000u;
        return {static_cast<uint16_t>(sign | low)};
    }
    const uint32_t rounded = size + 0xfffu + (size >> 13 & 1) - 0x38000000u;
    return {static_cast<uint16_t>(sign | rounded >> 13)};
}

template <class T>
inline uint32_t pack2(float a, float b) {
    return from_float<T>(a).bits | static_cast<uint32_t>(from_float<T>(b).bits) << 16;
}

template <class V>
inline V load_checked(const void* p) {
    host::check_alignment(p, sizeof(V));
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}
template <class V>
inline void store_checked(void* p, V v) {
    host::check_alignment(p, sizeof(V));
    memcpy(p, &v, sizeof(V));
}
inline uint4 load16(const void* p) { return load_checked<uint4>(p); }
inline uint2 load8(const void* p) { return load_checked<uint2>(p); }
inline uint32_t load4(const void* p) { return load_checked<uint32_t>(p); }
inline void store16(void* p, uint4 v) { store_checked(p, v); }
inline void store8(void* p, uint2 v) { store_checked(p, v); }
inline void store4(void* p, uint32_t v) { store_checked(p, v); }
inline uint4 shared_load16(const void* p) { return load_checked<uint4>(p); }
inline void shared_store16(void* p, uint4 v) { store_checked(p, v); }

inline float exp2_approx(float x) { return exp2f(x); }

inline void barrier(int id, int threads) {
    if (id < 1 || id > 15) host::fail("barrier %d does not exist", id);
    host::arrive_and_wait(host::barriers[id], threads);
}
}  // namespace simt
