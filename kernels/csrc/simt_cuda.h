// The CUDA side of simt.h: thin names for intrinsics and PTX.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SIMT_DYNAMIC_SHARED(T, name)                                    \
    extern __shared__ __align__(128) unsigned char simt_dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(simt_dynamic_shared)
#define SIMT_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define SIMT_ALLOW_SHARED(kernel, bytes)                                                          \
    static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,    \
                                          static_cast<int>(bytes)))
#define SIMT_LAUNCH(kernel, grid, block, bytes, stream, ...)                          \
    (kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
     static_cast<int>(cudaGetLastError()))
// Asked of the driver once; all devices of a process are taken to be alike
#define SIMT_RESIDENT_BLOCKS(kernel, threads, bytes)                                         \
    ([&] {                                                                                   \
        static const int blocks =                                                            \
            simt::resident_blocks(reinterpret_cast<const void*>(kernel), threads, bytes);    \
        return blocks;                                                                       \
    }())
#define SIMT_ERROR_TEXT(error) cudaGetErrorString(static_cast<cudaError_t>(error))
#define SIMT_PROCESSORS()                              \
    ([] {                                              \
        static const int count = simt::processors();   \
        return count;                                  \
    }())

namespace simt {
inline int processors() {
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

inline int resident_blocks(const void* kernel, int threads, size_t bytes) {
    int blocks = 1;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes);
    return processors() * (blocks > 0 ? blocks : 1);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(fp16 x) {
    return __half2float(__ushort_as_half(x.bits));
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}

template <class T>
__device__ __forceinline__ uint32_t pack2(float a, float b);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float a, float b) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}
template <>
__device__ __forceinline__ uint32_t pack2<fp16>(float a, float b) {
    __half2 pair = __floats2half2_rn(a, b);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

__device__ __forceinline__ float bits_as_float(uint32_t word) { return __uint_as_float(word); }
__device__ __forceinline__ uint32_t float_as_bits(float x) { return __float_as_uint(x); }

// Streams are read once: they need not push anything out of L1. Not volatile, so that loads may
// move above the shuffles of an earlier row; what is read must not be written by the same kernel.
__device__ __forceinline__ uint4 load16(const void* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
__device__ __forceinline__ uint2 load8(const void* p) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(p));
    return v;
}
__device__ __forceinline__ uint32_t load4(const void* p) {
    uint32_t v;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ void store16(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }
__device__ __forceinline__ void store8(void* p, uint2 v) { __stcs(static_cast<uint2*>(p), v); }
__device__ __forceinline__ void store4(void* p, uint32_t v) {
    __stcs(static_cast<unsigned*>(p), v);
}
__device__ __forceinline__ uint4 shared_load16(const void* p) {
    return *static_cast<const uint4*>(p);
}
__device__ __forceinline__ void shared_store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
}  // namespace simt
