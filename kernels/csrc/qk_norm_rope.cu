// K1, the host side: which instantiation serves a problem, and on how many blocks.
//
// bfloat16 has instantiations of its own for the usual head widths; every other width and type runs
// through two general ones (V = 8 and V = 4), whose lanes per row are a run-time number.
#include "qk_norm_rope.cuh"

namespace qk {
// Tokens that a warp walks at most: more leave the last blocks of a grid alone, fewer repeat the
// loading of weights
constexpr int tokens_a_warp = 4;
constexpr int most_heads = 1024;

static int rows_a_warp(int width) {
    const int lanes = width / (width % 16 == 0 ? 16 : 8);
    return simt::warp_size / lanes;
}

// Blocks of each side in proportion to nothing but its own units, so that both end together
static Division divide(const MmtrainQkNormRope& p, int resident) {
    Division d;
    for (int i = 0; i < 2; i++) {
        const int64_t heads = p.side[i].heads, rows = rows_a_warp(p.width);
        const int64_t chunks = (heads + rows - 1) / rows;
        // few tokens: their heads are spread until every warp of the device has a part
        int64_t parts = static_cast<int64_t>(resident) * warps / (p.tokens > 0 ? p.tokens : 1);
        parts = parts < 1 ? 1 : parts > chunks ? chunks : parts;
        const int64_t units = p.tokens * parts;
        int64_t each = units / (static_cast<int64_t>(resident) * warps);
        each = each < 1 ? 1 : each > tokens_a_warp ? tokens_a_warp : each;
        d.parts[i] = static_cast<int>(parts);
        d.blocks[i] = static_cast<int>((units + each * warps - 1) / (each * warps));
    }
    const int64_t heads = p.side[0].heads > p.side[1].heads ? p.side[0].heads : p.side[1].heads;
    d.row = static_cast<int>(heads > 2 * p.width ? heads : 2 * p.width);
    return d;
}

static bool any(const MmtrainQkNormRope& p, void* MmtrainQkSide::*field) {
    return p.side[0].*field || p.side[1].*field;
}

static size_t shared_bytes(const MmtrainQkNormRope& p) {
    const int64_t heads = p.side[0].heads > p.side[1].heads ? p.side[0].heads : p.side[1].heads;
    if (any(p, &MmtrainQkSide::d_scale)) return warps * heads * sizeof(float);
    if (any(p, &MmtrainQkSide::d_weight))
        return warps * rows_a_warp(p.width) * 2 * p.width * sizeof(float);
    return 0;
}

struct Forward {
    void* stream;
    template <class T, int V, int LANES, int STATISTIC, int PAIRING>
    int run(const MmtrainQkNormRope& p) const {
        const int resident =
            SIMT_RESIDENT_BLOCKS((forward_kernel<T, V, LANES, STATISTIC, PAIRING>), threads, 0);
        const Division d = divide(p, resident);
        return SIMT_LAUNCH((forward_kernel<T, V, LANES, STATISTIC, PAIRING>),
                           dim3(d.blocks[0] + d.blocks[1]), dim3(threads), 0, stream, p, d);
    }
};

// The workspace is asked for before the kernel is chosen, so the backward pass counts on two blocks
// a processor, which its launch bounds promise
static int backward_resident() { return 2 * SIMT_PROCESSORS(); }

struct Backward {
    float* partial;
    void* stream;
    template <class T, int V, int LANES, int STATISTIC, int PAIRING>
    int run(const MmtrainQkNormRope& p) const {
        const Division d = divide(p, backward_resident());
        return SIMT_LAUNCH((backward_kernel<T, V, LANES, STATISTIC, PAIRING>),
                           dim3(d.blocks[0] + d.blocks[1]), dim3(threads), shared_bytes(p), stream,
                           p, d, partial);
    }
};

template <class T, int V, int LANES, int STATISTIC, class Pass>
static int by_pairing(const MmtrainQkNormRope& p, const Pass& pass) {
    switch (p.pairing) {
        case MMTRAIN_PAIR_NONE:
            return pass.template run<T, V, LANES, STATISTIC, MMTRAIN_PAIR_NONE>(p);
        case MMTRAIN_PAIR_HALVES:
            return pass.template run<T, V, LANES, STATISTIC, MMTRAIN_PAIR_HALVES>(p);
        case MMTRAIN_PAIR_NEIGHBOURS:
            return pass.template run<T, V, LANES, STATISTIC, MMTRAIN_PAIR_NEIGHBOURS>(p);
    }
    return -1;
}

template <class T, int V, int LANES, class Pass>
static int by_norm(const MmtrainQkNormRope& p, const Pass& pass) {
    return p.norm == MMTRAIN_NORM_LAYER ? by_pairing<T, V, LANES, with_mean>(p, pass)
                                        : by_pairing<T, V, LANES, no_mean>(p, pass);
}

template <class T, class Pass>
static int any_width(const MmtrainQkNormRope& p, const Pass& pass) {
    return p.width % 16 == 0 ? by_norm<T, 8, 0>(p, pass) : by_norm<T, 4, 0>(p, pass);
}

template <class Pass>
static int usual_width(const MmtrainQkNormRope& p, const Pass& pass) {
    switch (p.width) {
        case 64: return by_norm<simt::bf16, 8, 4>(p, pass);
        case 72: return by_norm<simt::bf16, 4, 9>(p, pass);
        case 80: return by_norm<simt::bf16, 8, 5>(p, pass);
        case 88: return by_norm<simt::bf16, 4, 11>(p, pass);
        case 96: return by_norm<simt::bf16, 8, 6>(p, pass);
        case 128: return by_norm<simt::bf16, 8, 8>(p, pass);
    }
    return any_width<simt::bf16>(p, pass);
}

// Whether every row begins where a lane's vector may be read
static bool aligned(const MmtrainQkNormRope& p, const MmtrainRows& rows) {
    const int64_t bytes = p.element == MMTRAIN_FLOAT32 ? 4 : 2;
    const int64_t unit = p.width % 16 && bytes == 2 ? 8 : 16;
    return !rows.data || (reinterpret_cast<uintptr_t>(rows.data) % unit == 0 &&
                          rows.token_stride * bytes % unit == 0 &&
                          rows.head_stride * bytes % unit == 0);
}

template <class Pass>
static int dispatch(const MmtrainQkNormRope& p, const Pass& pass) {
    if (p.width < 32 || p.width > 256 || p.width % 8) return -1;
    if (p.norm < MMTRAIN_NORM_NONE || p.norm > MMTRAIN_NORM_L2) return -1;
    for (const MmtrainQkSide& side : p.side)
        if (side.heads < 1 || side.heads > most_heads || !aligned(p, side.x) ||
            !aligned(p, side.y) || !aligned(p, side.dy) || !aligned(p, side.dx))
            return -1;
    if (p.tokens == 0) return 0;
    switch (p.element) {
        case MMTRAIN_BFLOAT16: return usual_width(p, pass);
        case MMTRAIN_FLOAT16: return any_width<simt::fp16>(p, pass);
        case MMTRAIN_FLOAT32: return any_width<float>(p, pass);
    }
    return -1;
}
}  // namespace qk

extern "C" int mmtrain_qk_norm_rope(const MmtrainQkNormRope* problem, void* stream) {
    return qk::dispatch(*problem, qk::Forward{stream});
}

extern "C" int64_t mmtrain_qk_norm_rope_workspace_bytes(const MmtrainQkNormRope* problem) {
    const qk::Division d = qk::divide(*problem, qk::backward_resident());
    return static_cast<int64_t>(d.blocks[0] + d.blocks[1]) * d.row * sizeof(float);
}

extern "C" int mmtrain_qk_norm_rope_backward(const MmtrainQkNormRope* problem, void* workspace,
                                             void* stream) {
    const MmtrainQkNormRope& p = *problem;
    float* partial = static_cast<float*>(workspace);
    const int status = qk::dispatch(p, qk::Backward{partial, stream});
    const bool parameters =
        qk::any(p, &MmtrainQkSide::d_weight) || qk::any(p, &MmtrainQkSide::d_scale);
    if (status || !parameters) return status;
    const qk::Division d = qk::divide(p, qk::backward_resident());
    const int columns = (d.row + simt::warp_size - 1) / simt::warp_size;
    return SIMT_LAUNCH(qk::sum_partials_kernel, dim3(columns, 2), dim3(qk::threads), 0, stream, p,
                       d, partial);
}
