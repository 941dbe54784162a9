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
            p.parameter = element_of(vector);
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
    const int64_t bytes = mmtrain_qk_norm_rope_workspace_bytes(&p);
    Tensor workspace = empty(q, {bytes / 4}, ScalarType::Float);
    check(mmtrain_qk_norm_rope_backward(&p, workspace.data_ptr(), device.stream()),
          "qk_norm_rope_backward");
    return {gradients[0], gradients[1], gradients[2], gradients[3],
            gradients[4], gradients[5], gradients[6], gradients[7]};
}
}  // namespace

#ifdef MMTRAIN_EMULATE
STABLE_TORCH_LIBRARY_IMPL(mmtrain, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(mmtrain, CUDA, library) {
#endif
    library.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
    library.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
}
