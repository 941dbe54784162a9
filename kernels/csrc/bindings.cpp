// The kernels as implementations of torch ops, on torch's stable ABI.
//
// The only file that knows both torch and the launchers, and neither of them in depth: schemas,
// shapes for tracing, derivatives and autocast are written in Python (mmtrain/ops/), the kernels in
// files without torch. One library serves every torch from 2.11 on, with and without CUDA:
//
//   - only symbols of libtorch_cpu are linked; the current stream is looked up in libtorch_cuda if
//     that library is in the process;
//   - the host emulator takes the place of the kernels when this file is compiled with
//     MMTRAIN_EMULATE; then it implements the ops for CPU tensors.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cosine_attention.h"
#include "device.h"
#include "qk_norm_rope.h"

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

#ifdef MMTRAIN_EMULATE
struct OnDevice {
    explicit OnDevice(const Tensor&) {}
    void* stream() const { return nullptr; }
};
#else
// Makes a tensor's device the current one; its stream is that of torch
class OnDevice {
public:
    explicit OnDevice(const Tensor& x) : index_(x.get_device()), guard_(index_) {}

    void* stream() const {
        using Getter = int32_t (*)(int32_t, void**);
        // declared under USE_CUDA only, and a weak symbol would stay null: torch loads its
        // libraries where ours cannot see them
        static const Getter get = [] {
            void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
            return library ? reinterpret_cast<Getter>(
                                 dlsym(library, "aoti_torch_get_current_cuda_stream"))
                           : nullptr;
        }();
        STD_TORCH_CHECK(get, "this torch has no CUDA");
        void* stream = nullptr;
        STD_TORCH_CHECK(get(index_, &stream) == 0, "no current CUDA stream");
        return stream;
    }

private:
    int32_t index_;
    torch::stable::accelerator::DeviceGuard guard_;
};
#endif

void check(int status, const char* op) {
    STD_TORCH_CHECK(status == 0, op, ": ", mmtrain_error_text(status));
}

void* address(const Maybe& x) { return x.has_value() ? x->data_ptr() : nullptr; }

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(like, shape, type);
}

Tensor bytes_of(const Tensor& like, int64_t bytes) {
    return empty(like, {bytes}, ScalarType::Byte);
}

// Stands for a result that an op does not have in this call
Tensor nothing(const Tensor& like) { return empty(like, {0}, ScalarType::Float); }

Tensor empty_as(const Maybe& x, const Tensor& like) {
    return x.has_value() ? torch::stable::empty_like(*x) : nothing(like);
}

int32_t element_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return MMTRAIN_FLOAT32;
        case ScalarType::BFloat16: return MMTRAIN_BFLOAT16;
        case ScalarType::Half: return MMTRAIN_FLOAT16;
        default: STD_TORCH_CHECK(false, "wanted: float32, bfloat16 or float16");
    }
    return -1;
}

// --- K1 -----------------------------------------------------------------------------------------

MmtrainRows rows_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0,
                    "wanted: [tokens, heads, width], channels side by side, strides divisible by 8");
    return {x.data_ptr(), x.stride(0), x.stride(1)};
}

// What both passes are told in the same way; the order is that of the schema
struct Common {
    const Tensor &q, &k;
    const Maybe &q_weight, &k_weight, &q_bias, &k_bias, &q_scale, &k_scale;
    const Maybe &cosine, &sine, &positions;
    int64_t norm, pairing;
    double eps;

    MmtrainQkNormRope problem() const {
        MmtrainQkNormRope p = {};
        p.parameter = unknown;
        fill(p, 0, q, q_weight, q_bias, q_scale);
        fill(p, 1, k, k_weight, k_bias, k_scale);
        STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                            q.scalar_type() == k.scalar_type(),
                        "queries and keys differ in tokens, width or type");
        p.tokens = q.size(0);
        p.width = static_cast<int32_t>(q.size(2));
        p.norm = static_cast<int32_t>(norm);
        p.pairing = static_cast<int32_t>(pairing);
        p.element = element_of(q);
        p.eps = static_cast<float>(eps);
        if (pairing == MMTRAIN_PAIR_NONE) return p;
        for (const Maybe* table : {&cosine, &sine})
            STD_TORCH_CHECK(table->has_value() && (*table)->is_contiguous() &&
                                (*table)->scalar_type() == ScalarType::Float &&
                                (*table)->dim() == 2 && (*table)->size(1) * 2 == p.width,
                            "wanted: float32 tables [rows, width / 2]");
        p.cosine = static_cast<const float*>(cosine->data_ptr());
        p.sine = static_cast<const float*>(sine->data_ptr());
        p.table_rows = cosine->size(0);
        p.positions = address(positions);
        if (positions.has_value()) {
            STD_TORCH_CHECK(positions->is_contiguous() && positions->size(0) == p.tokens,
                            "wanted: one position a token");
            p.position_bytes = static_cast<int32_t>(positions->element_size());
        }
        return p;
    }

private:
    static constexpr int32_t unknown = -1;  // the type of parameters, before there is one

    static void fill(MmtrainQkNormRope& p, int i, const Tensor& x, const Maybe& weight,
                     const Maybe& bias, const Maybe& scale) {
        MmtrainQkSide& side = p.side[i];
        side.x = rows_of(x);
        side.heads = x.size(1);
        const int64_t sizes[] = {x.size(2), x.size(2), x.size(1)};
        const Maybe* given[] = {&weight, &bias, &scale};
        const void** fields[] = {&side.weight, &side.bias, &side.scale};
        for (int n = 0; n < 3; n++) {
            if (!given[n]->has_value()) continue;
            const Tensor& vector = **given[n];
            STD_TORCH_CHECK(vector.is_contiguous() && vector.numel() == sizes[n],
                            "a weight, bias or scale has the wrong size");
            const int32_t type = element_of(vector);
            STD_TORCH_CHECK(p.parameter == unknown || p.parameter == type,
                            "weights, biases and scales differ in type");
            p.parameter = type;
            *fields[n] = vector.data_ptr();
        }
    }
};

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using EightTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors qk_norm_rope(Tensor q, Tensor k, Maybe q_weight, Maybe k_weight, Maybe q_bias,
                        Maybe k_bias, Maybe q_scale, Maybe k_scale, Maybe cosine, Maybe sine,
                        Maybe positions, int64_t norm, int64_t pairing, double eps) {
    const OnDevice device(q);
    MmtrainQkNormRope p = Common{q,       k,    q_weight,  k_weight, q_bias,  k_bias, q_scale, k_scale,
                                 cosine, sine, positions, norm,     pairing, eps}
                              .problem();
    std::vector<Tensor> out, inverse, mean;
    for (const Tensor* x : {&q, &k}) {
        MmtrainQkSide& side = p.side[out.size()];
        out.push_back(empty(*x, {x->size(0), x->size(1), x->size(2)}, x->scalar_type()));
        side.y = rows_of(out.back());
        const bool normed = norm != MMTRAIN_NORM_NONE, centred = norm == MMTRAIN_NORM_LAYER;
        const std::vector<int64_t> rows{x->size(0), x->size(1)};
        inverse.push_back(normed ? empty(*x, rows, ScalarType::Float) : nothing(*x));
        mean.push_back(centred ? empty(*x, rows, ScalarType::Float) : nothing(*x));
        if (normed) side.inverse = static_cast<float*>(inverse.back().data_ptr());
        if (centred) side.mean = static_cast<float*>(mean.back().data_ptr());
    }
    check(mmtrain_qk_norm_rope(&p, device.stream()), "qk_norm_rope");
    return {out[0], out[1], inverse[0], inverse[1], mean[0], mean[1]};
}

EightTensors qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Maybe q_weight,
                                   Maybe k_weight, Maybe q_bias, Maybe k_bias, Maybe q_scale,
                                   Maybe k_scale, Maybe cosine, Maybe sine, Maybe positions,
                                   Tensor q_inverse, Tensor k_inverse, Tensor q_mean,
                                   Tensor k_mean, int64_t norm, int64_t pairing, double eps) {
    const OnDevice device(q);
    MmtrainQkNormRope p = Common{q,       k,    q_weight,  k_weight, q_bias,  k_bias, q_scale, k_scale,
                                 cosine, sine, positions, norm,     pairing, eps}
                              .problem();
    const Tensor* x[] = {&q, &k};
    const Tensor* upstream[] = {&dq_out, &dk_out};
    const Tensor* inverse[] = {&q_inverse, &k_inverse};
    const Tensor* mean[] = {&q_mean, &k_mean};
    const Maybe* parameters[][2] = {{&q_weight, &k_weight}, {&q_bias, &k_bias}, {&q_scale, &k_scale}};
    void* MmtrainQkSide::*const fields[] = {&MmtrainQkSide::d_weight, &MmtrainQkSide::d_bias,
                                            &MmtrainQkSide::d_scale};
    std::vector<Tensor> gradients;
    for (int i = 0; i < 2; i++) {
        MmtrainQkSide& side = p.side[i];
        gradients.push_back(
            empty(*x[i], {x[i]->size(0), x[i]->size(1), x[i]->size(2)}, x[i]->scalar_type()));
        side.dx = rows_of(gradients.back());
        side.dy = rows_of(*upstream[i]);
        if (norm != MMTRAIN_NORM_NONE) side.inverse = static_cast<float*>(inverse[i]->data_ptr());
        if (norm == MMTRAIN_NORM_LAYER) side.mean = static_cast<float*>(mean[i]->data_ptr());
    }
    for (int n = 0; n < 3; n++)
        for (int i = 0; i < 2; i++) {
            gradients.push_back(empty_as(*parameters[n][i], q));
            if (parameters[n][i]->has_value()) p.side[i].*fields[n] = gradients.back().data_ptr();
        }
    Tensor workspace = bytes_of(q, mmtrain_qk_norm_rope_workspace_bytes(&p));
    check(mmtrain_qk_norm_rope_backward(&p, workspace.data_ptr(), device.stream()),
          "qk_norm_rope_backward");
    return {gradients[0], gradients[1], gradients[2], gradients[3],
            gradients[4], gradients[5], gradients[6], gradients[7]};
}

// --- K2, K3 -------------------------------------------------------------------------------------

MmtrainStrides strides_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4 && x.stride(3) == 1,
                    "wanted: [batch, rows, heads, width], channels side by side");
    return {x.stride(0), x.stride(1), x.stride(2)};
}

template <class T>
const T* vector_of(const Maybe& x, ScalarType type) {
    if (!x.has_value()) return nullptr;
    STD_TORCH_CHECK(x->is_contiguous() && x->scalar_type() == type,
                    "a scale, bias, interval or length is not contiguous or of the wrong type");
    return static_cast<const T*>(x->data_ptr());
}

// What both passes are told in the same way
MmtrainCosineAttention cosine_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& log_scale, const Maybe& bias, const Maybe& lo,
                                      const Maybe& hi, const Maybe& key_lengths,
                                      double log_scale_max, double eps) {
    STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "queries, keys and values differ in type");
    const int32_t element = element_of(q);
    STD_TORCH_CHECK(element != MMTRAIN_FLOAT32, "wanted: bfloat16 or float16");
    MmtrainCosineAttention p = {};
    p.q_strides = strides_of(q), p.k_strides = strides_of(k), p.v_strides = strides_of(v);
    p.batch = static_cast<int32_t>(q.size(0));
    p.queries = static_cast<int32_t>(q.size(1));
    p.heads = static_cast<int32_t>(q.size(2));
    p.width = static_cast<int32_t>(q.size(3));
    p.keys = static_cast<int32_t>(k.size(1));
    for (const Tensor* x : {&k, &v})
        STD_TORCH_CHECK(x->size(0) == p.batch && x->size(1) == p.keys && x->size(2) == p.heads &&
                            x->size(3) == p.width,
                        "queries, keys and values differ in batch, heads or width");
    p.element = element == MMTRAIN_BFLOAT16 ? MMTRAIN_BF16 : MMTRAIN_FP16;
    p.log_scale_max = static_cast<float>(log_scale_max);
    p.eps = static_cast<float>(eps);
    p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
    STD_TORCH_CHECK(log_scale.numel() == p.heads, "wanted: one scale a head");
    p.log_scale = vector_of<float>(log_scale, ScalarType::Float);
    p.bias = vector_of<float>(bias, ScalarType::Float);
    p.bias_batches = bias.has_value() ? static_cast<int32_t>(bias->size(0)) : 1;
    p.lo = vector_of<int32_t>(lo, ScalarType::Int), p.hi = vector_of<int32_t>(hi, ScalarType::Int);
    p.interval_batches = lo.has_value() ? static_cast<int32_t>(lo->size(0)) : 1;
    p.key_lengths = vector_of<int32_t>(key_lengths, ScalarType::Int);
    return p;
}

std::tuple<Tensor, Tensor> cosine_attention(Tensor q, Tensor k, Tensor v, Tensor log_scale,
                                            Maybe bias, Maybe lo, Maybe hi, Maybe /* first */,
                                            Maybe /* last */, Maybe key_lengths,
                                            double log_scale_max, double eps) {
    const OnDevice device(q);
    MmtrainCosineAttention p =
        cosine_problem(q, k, v, log_scale, bias, lo, hi, key_lengths, log_scale_max, eps);
    Tensor out = empty(q, {p.batch, p.queries, p.heads, p.width}, q.scalar_type());
    Tensor lse = empty(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
    p.out = out.data_ptr();
    p.lse = static_cast<float*>(lse.data_ptr());
    check(mmtrain_cosine_attention_plan(&p, mmtrain_processors()), "cosine_attention");
    Tensor workspace = bytes_of(q, mmtrain_cosine_attention_workspace_bytes(&p));
    p.workspace = workspace.data_ptr();
    check(mmtrain_cosine_attention(&p, device.stream()), "cosine_attention");
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cosine_attention_backward(
    Tensor dout, Maybe dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor log_scale,
    Maybe bias, Maybe lo, Maybe hi, Maybe first, Maybe last, Maybe key_lengths,
    double log_scale_max, double eps, bool bias_gradient) {
    const OnDevice device(q);
    MmtrainCosineAttention p =
        cosine_problem(q, k, v, log_scale, bias, lo, hi, key_lengths, log_scale_max, eps);
    p.first = vector_of<int32_t>(first, ScalarType::Int);
    p.last = vector_of<int32_t>(last, ScalarType::Int);
    STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous(), "out and lse are not contiguous");
    p.out = out.data_ptr();
    p.lse = static_cast<float*>(lse.data_ptr());
    p.dout = dout.data_ptr();
    p.dout_strides = strides_of(dout);
    p.dlse = vector_of<float>(dlse, ScalarType::Float);
    p.dlse = vector_of<float>(dlse, ScalarType::Float);
    Tensor dq = empty(q, {p.batch, p.queries, p.heads, p.width}, q.scalar_type());
    Tensor dk = empty(q, {p.batch, p.keys, p.heads, p.width}, q.scalar_type());
    Tensor dv = empty(q, {p.batch, p.keys, p.heads, p.width}, q.scalar_type());
    Tensor dlog_scale = empty(q, {p.heads}, ScalarType::Float);
    Tensor dbias = bias_gradient ? empty_as(bias, q) : nothing(q);
    p.dq = dq.data_ptr(), p.dk = dk.data_ptr(), p.dv = dv.data_ptr();
    p.dlog_scale = static_cast<float*>(dlog_scale.data_ptr());
    p.dbias = bias_gradient ? static_cast<float*>(dbias.data_ptr()) : nullptr;
    check(mmtrain_cosine_attention_plan(&p, mmtrain_processors()), "cosine_attention_backward");
    Tensor workspace = bytes_of(q, mmtrain_cosine_attention_backward_workspace_bytes(&p));
    p.workspace = workspace.data_ptr();
    check(mmtrain_cosine_attention_backward(&p, device.stream()), "cosine_attention_backward");
    return {dq, dk, dv, dlog_scale, dbias};
}
}  // namespace

#ifdef MMTRAIN_EMULATE
STABLE_TORCH_LIBRARY_IMPL(mmtrain, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mmtrain, CUDA, library) {
#endif
    library.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
    library.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
    library.impl("cosine_attention", TORCH_BOX(&cosine_attention));
    library.impl("cosine_attention_backward", TORCH_BOX(&cosine_attention_backward));
}
