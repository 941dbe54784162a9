// Launchers of cosine attention; what they promise is in cosine_attention.h.
//
// Built for CUDA by nvcc and for the host emulator by g++; includes neither torch nor CUDA headers.
#include <algorithm>

#include "cosine_attention_backward.cuh"
#include "cosine_attention_forward.cuh"

// Widths of heads, rounded up to 16, that are compiled; tests that build few compile faster
#ifndef MMTRAIN_COSINE_DEPTHS
#define MMTRAIN_COSINE_DEPTHS(CASE) CASE(32) CASE(48) CASE(64) CASE(80) CASE(96) CASE(112) CASE(128)
#endif

namespace cosine {
constexpr int few_rows = 32, most_rows = 64;  // of a block
constexpr int processors_of_h200 = 132, blocks_per_processor = 4;
constexpr int64_t most_bias_partials_bytes = int64_t{256} << 20;

// Parts of the workspace, one behind the other, each 16-byte aligned
struct Room {
    char* begin;
    int64_t used = 0;
    float* take(int64_t count) {
        float* at = reinterpret_cast<float*>(begin + used);
        used += (count * static_cast<int64_t>(sizeof(float)) + 15) / 16 * 16;
        return count ? at : nullptr;
    }
};

static int64_t row_count(const Problem& p) { return int64_t{p.batch} * p.heads * p.queries; }
static int64_t bias_size(const Problem& p) {
    return int64_t{p.bias_batches} * p.heads * p.queries * p.keys;
}
static int depth_of(const Problem& p) { return std::max((p.width + 15) / 16 * 16, 32); }
static int row_block(const Problem& p) { return p.queries <= few_rows ? few_rows : most_rows; }
static bool one_pass(const Problem& p) { return p.queries <= most_rows; }

static ForwardPartials forward_partials(const Problem& p, Room& room) {
    const int64_t rows = p.splits > 1 ? p.splits * row_count(p) : 0;
    ForwardPartials partials;
    partials.out = room.take(rows * p.width);
    partials.sum = room.take(rows);
    partials.reference = room.take(rows);
    partials.bias_bound = room.take(p.bias ? p.heads : 0);
    return partials;
}

static BackwardPartials backward_partials(const Problem& p, Room& room) {
    BackwardPartials partials;
    partials.dq = room.take(p.splits > 1 && one_pass(p) ? p.splits * row_count(p) * p.width : 0);
    partials.scale =
        room.take(int64_t{p.batch} * p.heads * tiles_for(p.queries, row_block(p)));
    partials.delta = room.take(one_pass(p) ? 0 : row_count(p));
    float* groups = room.take(p.dbias && p.bias_groups > 1 ? p.bias_groups * bias_size(p) : 0);
    partials.dbias = groups ? groups : p.dbias;
    return partials;
}

static bool aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }
static bool aligned(const MmtrainStrides& s) { return (s.batch | s.row | s.head) % 8 == 0; }

static bool supported(const Problem& p) {
    return p.width > 0 && p.width <= 128 && p.width % 8 == 0 && p.batch >= 0 && p.heads > 0 &&
           p.queries >= 0 && p.keys >= 0 && (p.element == MMTRAIN_BF16 || p.element == MMTRAIN_FP16) &&
           p.eps > 0 && p.bias_batches > 0 && p.batch % p.bias_batches == 0 &&
           (p.interval_batches == 1 || p.interval_batches == p.batch || !p.lo) && !p.lo == !p.hi &&
           !p.first == !p.last && aligned(p.q) && aligned(p.k) && aligned(p.v) && aligned(p.out) &&
           aligned(p.dout) && aligned(p.q_strides) && aligned(p.k_strides) &&
           aligned(p.v_strides) && (!p.dout || aligned(p.dout_strides));
}

template <class T, int depth, int row_tiles>
int forward(const Problem& p, const ForwardPartials& partials, void* stream) {
    constexpr auto kernel = cosine_attention_forward<T, depth, row_tiles>;
    constexpr size_t bytes = sizeof(ForwardMemory<T, depth, row_tiles>);
    if (const int error = SIMT_ALLOW_SHARED(kernel, bytes)) return error;
    const int blocks = p.batch * p.heads * tiles_for(p.queries, 16 * row_tiles) * p.splits;
    if (const int error =
            SIMT_LAUNCH(kernel, dim3(blocks), dim3(block_threads), bytes, stream, p, partials))
        return error;
    if (p.splits == 1) return 0;
    const int row_blocks = static_cast<int>((row_count(p) + block_warps - 1) / block_warps);
    return SIMT_LAUNCH(cosine_attention_add_splits<T>, dim3(row_blocks), dim3(block_threads), 0,
                       stream, p, partials);
}

template <class T, int depth, int row_tiles, Pass pass>
int backward_pass(const Problem& p, const BackwardPartials& partials, int parts, void* stream) {
    constexpr auto kernel = cosine_attention_backward<T, depth, row_tiles, pass>;
    constexpr size_t bytes = sizeof(BackwardMemory<T, depth, row_tiles>);
    if (const int error = SIMT_ALLOW_SHARED(kernel, bytes)) return error;
    // a block does several batches only to sum their dbias
    const bool sums_bias = p.dbias && pass != Pass::queries;
    const int groups = sums_bias ? p.bias_groups : p.batch / p.bias_batches;
    const int blocks = groups * p.bias_batches * p.heads * parts;
    return SIMT_LAUNCH(kernel, dim3(blocks), dim3(block_threads), bytes, stream, p, partials, parts,
                       groups);
}

template <class T, int depth>
int backward_by_size(const Problem& p, const BackwardPartials& partials, void* stream) {
    if (!one_pass(p)) {
        const int rows = tiles_for(p.queries, most_rows), keys = tiles_for(p.keys, tile_keys);
        if (const int error = backward_pass<T, depth, 4, Pass::queries>(p, partials, rows, stream))
            return error;
        return backward_pass<T, depth, 4, Pass::keys>(p, partials, keys, stream);
    }
    const int error = p.queries <= few_rows
                          ? backward_pass<T, depth, 2, Pass::both>(p, partials, p.splits, stream)
                          : backward_pass<T, depth, 4, Pass::both>(p, partials, p.splits, stream);
    if (error || p.splits == 1) return error;
    const dim3 grid(p.batch * p.heads), block(block_threads);
    return p.queries <= few_rows
               ? SIMT_LAUNCH((cosine_attention_finish_rows<T, few_rows>), grid, block, 0, stream, p,
                             partials)
               : SIMT_LAUNCH((cosine_attention_finish_rows<T, most_rows>), grid, block, 0, stream, p,
                             partials);
}

template <class T>
int forward_by_width(const Problem& p, const ForwardPartials& partials, void* stream) {
    switch (depth_of(p)) {
#define CASE(depth)                                                                \
    case depth:                                                                    \
        return p.queries <= few_rows ? forward<T, depth, 2>(p, partials, stream)   \
                                     : forward<T, depth, 4>(p, partials, stream);
        MMTRAIN_COSINE_DEPTHS(CASE)
#undef CASE
    }
    return MMTRAIN_UNSUPPORTED;
}

template <class T>
int backward_by_width(const Problem& p, const BackwardPartials& partials, void* stream) {
    switch (depth_of(p)) {
#define CASE(depth) \
    case depth:     \
        return backward_by_size<T, depth>(p, partials, stream);
        MMTRAIN_COSINE_DEPTHS(CASE)
#undef CASE
    }
    return MMTRAIN_UNSUPPORTED;
}

static int clear(float* x, int64_t count, void* stream) {
    const int blocks = static_cast<int>((count + block_threads - 1) / block_threads);
    return SIMT_LAUNCH(cosine_attention_clear, dim3(blocks), dim3(block_threads), 0, stream, x,
                       count);
}

// Without a row or a key all gradients are zero
static int backward_of_nothing(const Problem& p, void* stream) {
    const int64_t row = int64_t{p.batch} * p.heads * p.width / 2;  // in floats
    const struct {
        void* x;
        int64_t count;
    } results[] = {{p.dq, p.queries * row},
                   {p.dk, p.keys * row},
                   {p.dv, p.keys * row},
                   {p.dlog_scale, p.heads},
                   {p.dbias, p.dbias ? bias_size(p) : 0}};
    for (const auto& result : results)
        if (result.count)
            if (const int error = clear(static_cast<float*>(result.x), result.count, stream))
                return error;
    return 0;
}

static int backward(const Problem& p, const BackwardPartials& partials, void* stream) {
    if (row_count(p) == 0 || p.keys == 0) return backward_of_nothing(p, stream);
    if (p.dbias)  // of keys that are skipped, and the start of sums
        if (const int error = clear(partials.dbias, p.bias_groups * bias_size(p), stream))
            return error;
    if (const int error = p.element == MMTRAIN_BF16
                              ? backward_by_width<simt::bf16>(p, partials, stream)
                              : backward_by_width<simt::fp16>(p, partials, stream))
        return error;
    if (const int error = SIMT_LAUNCH(cosine_attention_scale_gradient, dim3(p.heads), dim3(32), 0,
                                      stream, p, partials, tiles_for(p.queries, row_block(p))))
        return error;
    if (!p.dbias || p.bias_groups == 1) return 0;
    const int blocks = static_cast<int>((bias_size(p) + block_threads - 1) / block_threads);
    return SIMT_LAUNCH(cosine_attention_add_groups, dim3(blocks), dim3(block_threads), 0, stream,
                       static_cast<const float*>(partials.dbias), p.dbias, bias_size(p),
                       p.bias_groups);
}
}  // namespace cosine

// Enough blocks to fill the processors, and no part of the keys below two tiles
extern "C" int mmtrain_cosine_attention_plan(MmtrainCosineAttention* problem, int processors) {
    using namespace cosine;
    Problem& p = *problem;
    if (!supported(p)) return MMTRAIN_UNSUPPORTED;
    const int64_t wanted =
        int64_t{processors > 0 ? processors : processors_of_h200} * blocks_per_processor;
    const int64_t blocks =
        std::max(int64_t{p.batch} * p.heads * tiles_for(p.queries, row_block(p)), int64_t{1});
    const int64_t tiles = tiles_for(p.keys, tile_keys);
    p.splits = static_cast<int>(std::max(
        std::min((wanted + blocks - 1) / blocks, one_pass(p) ? tiles / 2 : int64_t{1}), int64_t{1}));

    const int64_t parts = one_pass(p) ? p.splits : std::max(tiles, int64_t{1});
    const int64_t bytes = std::max(bias_size(p) * int64_t{sizeof(float)}, int64_t{1});
    const int64_t groups = std::min((wanted - 1) / (int64_t{p.bias_batches} * p.heads * parts) + 1,
                                    most_bias_partials_bytes / bytes);
    p.bias_groups = static_cast<int>(
        std::max(std::min(groups, int64_t{p.batch} / p.bias_batches), int64_t{1}));
    return 0;
}

extern "C" int64_t mmtrain_cosine_attention_workspace_bytes(const MmtrainCosineAttention* problem) {
    cosine::Room room{nullptr};
    cosine::forward_partials(*problem, room);
    return room.used;
}

extern "C" int mmtrain_cosine_attention(const MmtrainCosineAttention* problem, void* stream) {
    using namespace cosine;
    const Problem& p = *problem;
    if (!supported(p)) return MMTRAIN_UNSUPPORTED;
    if (row_count(p) == 0) return 0;
    Room room{static_cast<char*>(p.workspace)};
    const ForwardPartials partials = forward_partials(p, room);
    if (p.bias)
        if (const int error = SIMT_LAUNCH(cosine_attention_bias_bound, dim3(p.heads),
                                          dim3(block_threads), 0, stream, p, partials.bias_bound))
            return error;
    return p.element == MMTRAIN_BF16 ? forward_by_width<simt::bf16>(p, partials, stream)
                                     : forward_by_width<simt::fp16>(p, partials, stream);
}

extern "C" int64_t mmtrain_cosine_attention_backward_workspace_bytes(
    const MmtrainCosineAttention* problem) {
    cosine::Room room{nullptr};
    cosine::backward_partials(*problem, room);
    return room.used;
}

extern "C" int mmtrain_cosine_attention_backward(const MmtrainCosineAttention* problem,
                                                 void* stream) {
    using namespace cosine;
    const Problem& p = *problem;
    if (!supported(p)) return MMTRAIN_UNSUPPORTED;
    Room room{static_cast<char*>(p.workspace)};
    return backward(p, backward_partials(p, room), stream);
}
