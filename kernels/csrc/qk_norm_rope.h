// K1, the launchers: norm of queries and keys per head, then the rotary embedding; and its backward.
//
// Plain C, so that the kernels know no torch and the bindings and tests know no CUDA.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum MmtrainNorm { MMTRAIN_NORM_NONE, MMTRAIN_NORM_RMS, MMTRAIN_NORM_LAYER, MMTRAIN_NORM_L2 };
enum MmtrainPairing { MMTRAIN_PAIR_NONE, MMTRAIN_PAIR_HALVES, MMTRAIN_PAIR_NEIGHBOURS };
enum MmtrainElement { MMTRAIN_FLOAT32, MMTRAIN_BFLOAT16, MMTRAIN_FLOAT16 };

// [T, H, D], elements of a row side by side; rows aligned to 16 bytes (to 8 where 16 does not
// divide D and elements have 16 bits)
struct MmtrainRows {
    void* data;
    int64_t token_stride, head_stride;  // in elements
};

// Queries or keys. What is not there is null.
struct MmtrainQkSide {
    struct MmtrainRows x;   // input
    struct MmtrainRows y;   // forward: output
    struct MmtrainRows dy;  // backward: gradient of the output
    struct MmtrainRows dx;  // backward: gradient of the input
    int64_t heads;
    const void *weight, *bias;  // [D]: RMS and layer norm; bias: layer norm
    const void* scale;          // [H]: L2
    void *d_weight, *d_bias, *d_scale;
    float *inverse, *mean;  // [T, H]: reciprocal norm and mean, written forward, read backward
};

struct MmtrainQkNormRope {
    struct MmtrainQkSide side[2];  // queries, keys
    const float *cosine, *sine;    // [table_rows, D / 2]
    const void* positions;         // [T] rows of the tables; null: token t reads row t % table_rows
    int64_t tokens, table_rows;
    int32_t width;           // D, a multiple of 8, 32 to 256
    int32_t norm, pairing;   // MmtrainNorm, MmtrainPairing
    int32_t element;         // MmtrainElement of x, y, dy, dx
    int32_t parameter;       // MmtrainElement of weights, biases, scales and their gradients
    int32_t position_bytes;  // 4 or 8
    float eps;
};

// 0, a CUDA error, or -1 for what is not supported
int mmtrain_qk_norm_rope(const struct MmtrainQkNormRope* problem, void* stream);
int mmtrain_qk_norm_rope_backward(const struct MmtrainQkNormRope* problem, void* workspace,
                                  void* stream);
// Of the workspace of the backward pass; it need not be filled
int64_t mmtrain_qk_norm_rope_workspace_bytes(const struct MmtrainQkNormRope* problem);

#ifdef __cplusplus
}
#endif
