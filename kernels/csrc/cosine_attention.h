/* Fused scaled-cosine attention, forward and backward: what callers give and get.
 *
 * For batch b, head h, query row i and key j (log_scale is learned, one number a head):
 *
 *     z_ij = exp(min(log_scale_h, log_scale_max)) q_i.k_j / (max(|q_i|, eps) max(|k_j|, eps)) + bias_ij
 *     out_i = sum_j softmax_j(z_ij) v_j                    lse_i = log sum_j exp(z_ij)
 *
 * over the keys lo_i <= j < min(hi_i, key_length_b). A row that sees no key has out = 0, lse = -inf
 * and no gradient. Nothing of size queries x keys is stored.
 *
 * Usage: fill in the problem; `..._plan` checks it and chooses how the work is cut; allocate
 * `..._workspace_bytes`; launch. Every launch is asynchronous on `stream`. Results are
 * deterministic: no atomics, the same order of sums for the same plan.
 *
 * Return values: 0; MMTRAIN_UNSUPPORTED, nothing was launched; or a CUDA error code.
 */
#pragma once
#include <stdint.h>

#define MMTRAIN_BF16 0
#define MMTRAIN_FP16 1
#define MMTRAIN_UNSUPPORTED (-1)

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int64_t batch, row, head; /* in elements, multiples of 8; channels are contiguous */
} MmtrainStrides;

typedef struct {
    /* sizes */
    int32_t batch, heads, queries, keys;
    int32_t width;        /* channels of a head: a multiple of 8, at most 128 */
    int32_t element;      /* MMTRAIN_BF16 or MMTRAIN_FP16: type of q, k, v, out, their gradients */
    float log_scale_max;  /* above it log_scale has no effect and no gradient */
    float eps;            /* above 0 */

    /* inputs, 16-byte aligned */
    const void *q, *k, *v; /* [batch, queries | keys, heads, width] in any order of dims */
    MmtrainStrides q_strides, k_strides, v_strides;
    const float* log_scale; /* [heads] */
    const float* bias;      /* [bias_batches, heads, queries, keys] or null; batch b reads number */
    int32_t bias_batches;   /* b % bias_batches; divides batch; 1 without a bias */
    const int32_t *lo, *hi; /* [interval_batches, queries], both or neither; 0 <= lo, hi <= keys */
    /* backward only, with lo and hi: rows [first, last) include all that see a key;
     * [interval_batches, keys], both or neither */
    const int32_t *first, *last;
    int32_t interval_batches;   /* 1 or batch */
    const int32_t* key_lengths; /* [batch] or null; 0 <= length <= keys */

    /* results of the forward pass, inputs of the backward pass; contiguous */
    void* out;  /* [batch, queries, heads, width] */
    float* lse; /* [batch, heads, queries], natural logarithm */

    /* backward pass */
    const void* dout; /* [batch, queries, heads, width] */
    MmtrainStrides dout_strides;
    const float* dlse; /* [batch, heads, queries] or null */
    void *dq, *dk, *dv;  /* contiguous, [batch, queries | keys, heads, width] */
    float* dlog_scale;   /* [heads] */
    float* dbias;        /* as bias, or null if not wanted */

    /* chosen by ..._plan; may be changed before the workspace is sized */
    int32_t splits;      /* parts that the keys are cut into */
    int32_t bias_groups; /* partial sums of dbias */

    void* workspace; /* 16-byte aligned */
} MmtrainCosineAttention;

int mmtrain_cosine_attention_plan(MmtrainCosineAttention* problem, int processors);
int64_t mmtrain_cosine_attention_workspace_bytes(const MmtrainCosineAttention* problem);
int mmtrain_cosine_attention(const MmtrainCosineAttention* problem, void* stream);
int64_t mmtrain_cosine_attention_backward_workspace_bytes(const MmtrainCosineAttention* problem);
int mmtrain_cosine_attention_backward(const MmtrainCosineAttention* problem, void* stream);

#ifdef __cplusplus
}
#endif
