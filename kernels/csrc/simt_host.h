// The host side of simt.h: CUDA threads as fibers, blocks one after another.
//
// A fiber runs until it waits at a barrier or ends. Fibers are entered once through makecontext and
// switched with _setjmp / _longjmp afterwards, which makes no system call (ucontext alone is ten
// times slower). They outlive launches, so their stacks are made once.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
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

namespace simt::host {
constexpr size_t stack_bytes = 128 * 1024;
constexpr size_t shared_bytes_plain = 48 * 1024;      // above: SIMT_ALLOW_SHARED first
constexpr size_t shared_bytes_limit = 227 * 1024;     // sm_90; sm_80 has 163 KB
constexpr size_t guard_bytes = 256;                   // behind shared memory and below stacks
constexpr unsigned char poison = 0xff, guard = 0xa5;  // poison reads as NaN in every float type
constexpr int launch_failed = 999;                    // cudaErrorUnknown

struct Barrier {
    int arrived = 0;
    uint64_t generation = 0;
};

struct Fiber {
    ucontext_t entry;
    jmp_buf state;
    std::unique_ptr<unsigned char[]> stack;
    dim3 index;
    int number = 0;
    bool started = false, done = false;
    const Barrier* waits_for = nullptr;  // not to be resumed before its generation has changed
    uint64_t generation = 0;
};

struct Warp {
    Barrier full;
    std::map<unsigned, Barrier> parts;  // by mask
    uint64_t slots[warp_size] = {};
    unsigned masks[warp_size] = {};
};

struct StaticShared {
    void* address;
    size_t bytes;
};

inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Warp> warps;
inline Barrier barriers[16];
inline std::function<void()> body;
inline dim3 block_index, grid_size, block_size;
inline std::vector<unsigned char> dynamic_shared;
inline std::vector<StaticShared> static_shared;
inline std::map<const void*, size_t> allowed_shared;
inline uint64_t random_state = 88172645463325252ull;
inline int resident_blocks = 2;
inline bool failed = false;
inline char error[512] = "";

inline uint64_t random_number() {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

inline void switch_to_scheduler() {
    if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

// Ends the launch with an error; called by a fiber, does not return.
[[noreturn]] inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int used = snprintf(error, sizeof error, "block (%u, %u, %u) thread %d: ", block_index.x,
                        block_index.y, block_index.z, current ? current->number : -1);
    vsnprintf(error + used, sizeof error - used, format, arguments);
    va_end(arguments);
    failed = true;
    _longjmp(scheduler, 1);
}

inline void arrive_and_wait(Barrier& barrier, int threads) {
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    current->waits_for = &barrier;
    current->generation = barrier.generation;
    switch_to_scheduler();
}

inline void check_alignment(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail("%zu-byte access at %p is misaligned", bytes, p);
}

inline void run_body() {
    for (;;) {
        body();
        current->done = true;
        switch_to_scheduler();
    }
}

inline void resume(Fiber& fiber) {
    current = &fiber;
    fiber.waits_for = nullptr;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    setcontext(&fiber.entry);
}

inline std::unique_ptr<Fiber> make_fiber() {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new unsigned char[stack_bytes]);
    memset(fiber->stack.get(), guard, guard_bytes);
    getcontext(&fiber->entry);
    fiber->entry.uc_stack.ss_sp = fiber->stack.get();
    fiber->entry.uc_stack.ss_size = stack_bytes;
    fiber->entry.uc_link = nullptr;
    makecontext(&fiber->entry, run_body, 0);
    return fiber;
}

inline unsigned char* aligned_dynamic_shared() {
    auto address = reinterpret_cast<uintptr_t>(dynamic_shared.data());
    return reinterpret_cast<unsigned char*>((address + 127) & ~uintptr_t{127});
}

inline bool intact(const unsigned char* bytes) {
    for (size_t i = 0; i < guard_bytes; i++)
        if (bytes[i] != guard) return false;
    return true;
}

inline void start_block(int threads, size_t bytes) {
    for (auto& barrier : barriers) barrier = Barrier();
    warps.assign((threads + warp_size - 1) / warp_size, Warp());
    memset(aligned_dynamic_shared(), poison, bytes);
    memset(aligned_dynamic_shared() + bytes, guard, guard_bytes);
    for (auto& shared : static_shared) memset(shared.address, poison, shared.bytes);
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = *fibers[i];
        fiber.number = i;
        fiber.index = dim3(i % block_size.x, i / block_size.x % block_size.y,
                           i / (block_size.x * block_size.y));
        fiber.done = false;
        fiber.waits_for = nullptr;
    }
}

// Which warps rest, one bit each. They rest for a few passes, so that warps get ahead of each other
// by several barriers' worth of work: that is what a missing __syncthreads shows at.
inline unsigned resting_warps(unsigned before) {
    return random_number() % 4 ? before : static_cast<unsigned>(random_number());
}

// One pass over all fibers that can run, in an order drawn anew; false if there was none.
inline bool run_pass(int threads, unsigned resting, int& left) {
    bool progress = false;
    int number = static_cast<int>(random_number() % threads);
    const int step = random_number() & 1 ? 1 : threads - 1;
    for (int k = 0; k < threads && !failed; k++, number = (number + step) % threads) {
        Fiber& fiber = *fibers[number];
        if (fiber.done || resting >> (number / warp_size) & 1) continue;
        if (fiber.waits_for && fiber.waits_for->generation == fiber.generation) continue;
        resume(fiber);
        progress = true;
        left -= fiber.done;
    }
    return progress;
}

inline void run_block(int threads, size_t bytes) {
    start_block(threads, bytes);
    unsigned resting = 0;
    for (int left = threads; left > 0 && !failed;) {
        resting = resting_warps(resting);
        if (run_pass(threads, resting, left)) continue;
        resting = 0;  // all that can run may rest
        if (run_pass(threads, resting, left) || failed) continue;
        failed = true;
        snprintf(error, sizeof error,
                 "deadlock in block (%u, %u, %u): %d of %d threads wait at a barrier or shuffle "
                 "that the others never reach",
                 block_index.x, block_index.y, block_index.z, left, threads);
    }
    if (failed || intact(aligned_dynamic_shared() + bytes)) return;
    failed = true;
    snprintf(error, sizeof error, "block (%u, %u, %u) wrote past its %zu bytes of shared memory",
             block_index.x, block_index.y, block_index.z, bytes);
}

inline int refuse(const char* reason) {
    snprintf(error, sizeof error, "launch refused: %s", reason);
    return launch_failed;
}

inline int launch(const void* kernel, dim3 grid, dim3 block, size_t bytes,
                  std::function<void()> call) {
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024) return refuse("a block has 1 to 1024 threads");
    if (!grid.x || !grid.y || !grid.z) return refuse("an empty grid");
    if (grid.y > 65535 || grid.z > 65535) return refuse("grid.y and grid.z are at most 65535");
    if (bytes > shared_bytes_plain && bytes > allowed_shared[kernel])
        return refuse("more than 48 KB of shared memory without SIMT_ALLOW_SHARED");
    body = std::move(call);
    grid_size = grid;
    block_size = block;
    dynamic_shared.resize(bytes + guard_bytes + 128);
    while (fibers.size() < threads) fibers.push_back(make_fiber());
    failed = false;
    for (unsigned z = 0; z < grid.z && !failed; z++)
        for (unsigned y = 0; y < grid.y && !failed; y++)
            for (unsigned x = 0; x < grid.x && !failed; x++) {
                block_index = dim3(x, y, z);
                run_block(static_cast<int>(threads), bytes);
            }
    for (size_t i = 0; i < threads && !failed; i++)
        if (!intact(fibers[i]->stack.get())) {
            failed = true;
            snprintf(error, sizeof error, "thread %zu used more than its stack", i);
        }
    if (failed) fibers.clear();  // some are in the middle of the kernel
    current = nullptr;
    return failed ? launch_failed : 0;
}

inline int allow_shared(const void* kernel, size_t bytes) {
    if (bytes > shared_bytes_limit) return refuse("more shared memory than an SM has");
    allowed_shared[kernel] = bytes;
    return 0;
}

// Static shared memory of one SIMT_SHARED: poisoned when it is first reached and before every block
template <class T, size_t count>
struct StaticArray {
    alignas(128) unsigned char bytes[sizeof(T) * count];
    StaticArray() {
        memset(bytes, poison, sizeof bytes);
        static_shared.push_back({bytes, sizeof bytes});
    }
};
}  // namespace simt::host

#define threadIdx (simt::host::current->index)
#define blockIdx (simt::host::block_index)
#define blockDim (simt::host::block_size)
#define gridDim (simt::host::grid_size)

#define SIMT_DYNAMIC_SHARED(T, name) \
    T* name = reinterpret_cast<T*>(simt::host::aligned_dynamic_shared())
#define SIMT_SHARED(T, name, count)                                \
    static simt::host::StaticArray<T, (count)> name##_simt_shared; \
    T* name = reinterpret_cast<T*>(name##_simt_shared.bytes)
#define SIMT_ALLOW_SHARED(kernel, bytes) \
    simt::host::allow_shared(reinterpret_cast<const void*>(kernel), bytes)
#define SIMT_LAUNCH(kernel, grid, block, bytes, stream, ...)                              \
    ((void)(stream), simt::host::launch(reinterpret_cast<const void*>(kernel), grid, block, \
                                        bytes, [&] { kernel(__VA_ARGS__); }))
#define SIMT_RESIDENT_BLOCKS(kernel, threads, bytes) simt::host::resident_blocks
#define SIMT_ERROR_TEXT(code) ((void)(code), simt::host::error)
#define SIMT_PROCESSORS() (simt::host::resident_blocks / 2 > 0 ? simt::host::resident_blocks / 2 : 1)

extern "C" inline __attribute__((used)) void mmtrain_emulator_seed(uint64_t seed) {
    simt::host::random_state = seed * 0x9e3779b97f4a7c15ull | 1;
}
extern "C" inline __attribute__((used)) const char* mmtrain_emulator_error() {
    return simt::host::error;
}
extern "C" inline __attribute__((used)) void mmtrain_emulator_resident_blocks(int blocks) {
    simt::host::resident_blocks = blocks;
}

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
