// One source, two targets: nvcc makes a CUDA kernel of it, g++ -DMMTRAIN_EMULATE a host library.
//
// Kernels include this header (and tc.h) and neither torch's nor CUDA's, so that any engineer can
// run the very same source on a laptop. On the host every CUDA thread is a fiber; the emulator
// checks what a GPU would hide or punish much later:
//
//   - shared memory, dynamic and static, is filled with NaN (0xFF) before every block;
//   - fibers run in a random order that changes at every pass, and warps rest at random, so that a
//     missing barrier shows;
//   - a shuffle from a lane outside the mask, lanes that come with different masks, a barrier that
//     some threads never reach (a deadlock on a GPU) are reported, and the launch returns an error;
//   - vector accesses must be aligned to their size; nothing may be written past the shared memory
//     that was asked for; more than 48 KB of it must have been allowed; grids and blocks must have
//     sizes that a GPU takes.
//
// It does not see: races inside one warp step, memory order, bank conflicts, speed.
//
// Interface (the same on both targets; everything else is plain CUDA C++):
//
//   SIMT_DYNAMIC_SHARED(T, name)              T* name, the block's dynamic shared memory
//   SIMT_SHARED(T, name, count)               T* name, `count` elements of static shared memory
//                                             (__shared__ itself does not compile on the host)
//   SIMT_ALLOW_SHARED(kernel, bytes)          int, 0 or an error; needed above 48 KB
//   SIMT_LAUNCH(kernel, grid, block, bytes, stream, arguments...)
//                                             int, 0 or an error; a kernel with template
//                                             arguments stands in parentheses
//   SIMT_RESIDENT_BLOCKS(kernel, threads, bytes)
//                                             int, blocks that fill the device once
//   SIMT_PROCESSORS()                         int, streaming multiprocessors of the device
//   SIMT_ERROR_TEXT(error)                    const char*, of a launch that did not return 0
//   simt::bf16, simt::fp16, float             element types; the first two hold `uint16_t bits`
//   simt::to_float(x), simt::from_float<T>(f) round to nearest even
//   simt::unpack2<T>(word) -> float2, simt::pack2<T>(a, b) -> uint32_t      T: bf16 or fp16
//   simt::bits_as_float(word), float_as_bits(x)     reinterpretations
//   simt::load16(p), load8(p), load4(p)       uint4, uint2, uint32_t from global memory, read once,
//                                             never written by the same kernel
//   simt::store16(p, v), store8, store4       to global memory, not read again soon
//   simt::shared_load16(p), shared_store16(p, v)    the same in shared memory
//   simt::exp2_approx(x)                      2^x by the special function unit
//   simt::barrier(id, threads)                bar.sync of a part of the block, id 1 to 15
//
// Host only, for tests (C names): mmtrain_emulator_seed(n), mmtrain_emulator_error() -> text of the
// last failed launch, mmtrain_emulator_resident_blocks(n) -> what SIMT_RESIDENT_BLOCKS gives.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace simt {
constexpr int warp_size = 32;
constexpr unsigned full_mask = 0xffffffffu;
struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};
}  // namespace simt

#ifndef MMTRAIN_EMULATE
#include "simt_cuda.h"
#else
#include "simt_host.h"
#endif

namespace simt {
// Packing of two 16-bit elements into a word, the lower address in the lower half
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t word) {
    T low, high;
    low.bits = static_cast<uint16_t>(word & 0xffffu);
    high.bits = static_cast<uint16_t>(word >> 16);
    return make_float2(to_float(low), to_float(high));
}
}  // namespace simt
