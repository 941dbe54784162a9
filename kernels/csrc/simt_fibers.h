// CUDA threads as fibers, blocks one after another: launches, scheduling, shared memory, checks.
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

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

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
