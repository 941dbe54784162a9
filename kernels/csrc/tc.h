// Tensor-core primitives of one warp, and copies that overlap with arithmetic: PTX on a GPU, an
// emulation on the host (see simt.h).
//
//   tc::multiply<T>(c, a, b0, b1)     c[16 x 8] += a[16 x 16] b[16 x 8], mma.sync m16n8k16
//   tc::load_tiles(r, p)              four 8 x 8 tiles, lane 8 m + i gives row i of tile m (ldmatrix)
//   tc::load_tiles_transposed(r, p)   the same, each tile transposed
//   tc::copy16(shared, global, there) 16 bytes of global memory, or zeros (cp.async)
//   tc::commit()                      copies since the last commit are one group
//   tc::wait<n>()                     until at most the n newest groups of this thread are under way
//
// Where the elements of a lane lie (g = lane / 4, t = lane % 4):
//   a: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8), each with its right neighbour
//   b: (2t, g) (2t + 8, g), each with the one below
//   c: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
// so two accumulators side by side, packed to 16 bits, are the `a` of the next product.
//
// On the host a copy happens at its `wait`: reading before it finds poison.
#pragma once
#include "simt.h"

namespace tc {
#ifndef MMTRAIN_EMULATE

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1);
#define MMTRAIN_MULTIPLY(type, name)                                                            \
    template <>                                                                                 \
    __device__ __forceinline__ void multiply<type>(float (&c)[4], const uint32_t (&a)[4],       \
                                                   uint32_t b0, uint32_t b1) {                  \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                     \
                     ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"               \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));           \
    }
MMTRAIN_MULTIPLY(simt::bf16, "bf16")
MMTRAIN_MULTIPLY(simt::fp16, "f16")
#undef MMTRAIN_MULTIPLY

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void load_tiles(uint32_t (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
__device__ __forceinline__ void load_tiles_transposed(uint32_t (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}

__device__ __forceinline__ void copy16(void* shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

#else

// What the lanes of a warp bring to one collective operation
struct Exchange {
    float a[16][16], b[16][8];
    const uint16_t* rows[simt::warp_size];
};
inline Exchange exchanges[32];

template <class T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int number = simt::host::current->number, lane = number % 32, g = lane / 4, t = lane % 4;
    Exchange& x = exchanges[number / 32];
    for (int i = 0; i < 4; i++) {
        const float2 pair = simt::unpack2<T>(a[i]);
        float* to = &x.a[g + i % 2 * 8][2 * t + i / 2 * 8];
        to[0] = pair.x;
        to[1] = pair.y;
    }
    for (int i = 0; i < 2; i++) {
        const float2 pair = simt::unpack2<T>(i ? b1 : b0);
        x.b[2 * t + 8 * i][g] = pair.x;
        x.b[2 * t + 8 * i + 1][g] = pair.y;
    }
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        float sum = 0.0f;
        for (int k = 0; k < 16; k++) sum += x.a[g + i / 2 * 8][k] * x.b[k][2 * t + i % 2];
        c[i] += sum;
    }
    __syncwarp();
}

template <bool transposed>
inline void load_tiles_of(uint32_t (&r)[4], const void* p) {
    const int number = simt::host::current->number, lane = number % 32, g = lane / 4, t = lane % 4;
    Exchange& x = exchanges[number / 32];
    simt::host::check_alignment(p, 16);
    x.rows[lane] = static_cast<const uint16_t*>(p);
    __syncwarp();
    for (int m = 0; m < 4; m++) {
        const uint16_t* const* rows = x.rows + 8 * m;
        const uint16_t low = transposed ? rows[2 * t][g] : rows[g][2 * t];
        const uint16_t high = transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
        r[m] = low | static_cast<uint32_t>(high) << 16;
    }
    __syncwarp();
}
inline void load_tiles(uint32_t (&r)[4], const void* p) { load_tiles_of<false>(r, p); }
inline void load_tiles_transposed(uint32_t (&r)[4], const void* p) { load_tiles_of<true>(r, p); }

struct Copy {
    void* to;
    const void* from;  // null: zeros
};
struct Copies {
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
    unsigned block[3] = {~0u, 0, 0};
};
inline Copies copies[1024];  // by thread

inline Copies& copies_of_thread() {
    Copies& mine = copies[simt::host::current->number];
    const dim3 at = simt::host::block_index;
    if (mine.block[0] != at.x || mine.block[1] != at.y || mine.block[2] != at.z) {
        mine = Copies();  // an earlier block ended with copies under way
        mine.block[0] = at.x, mine.block[1] = at.y, mine.block[2] = at.z;
    }
    return mine;
}
inline void copy16(void* shared, const void* global, bool there) {
    simt::host::check_alignment(shared, 16);
    simt::host::check_alignment(global, 16);
    copies_of_thread().open.push_back({shared, there ? global : nullptr});
}
inline void commit() {
    Copies& mine = copies_of_thread();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int groups>
inline void wait() {
    Copies& mine = copies_of_thread();
    while (mine.groups.size() > groups) {
        for (const Copy& copy : mine.groups.front())
            copy.from ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
        mine.groups.erase(mine.groups.begin());
    }
}

#endif
}  // namespace tc
