// What a kernel of NormSoftmax attention is asked to do. Formula: math/norm_attention.h.
#pragma once

#include "common/dtype.h"
#include "common/norm_softmax.h"
#include "common/rows.h"

namespace effkern {

// Rows of queries are counted through (batch, heads, rows), of keys through (batch, key_heads,
// keys). Query head h goes with key head h / (heads / key_heads).
struct AttentionTask {
  DType dtype;  // of queries, keys, values, outputs and gradients
  int64_t batch, heads, key_heads, rows, keys, features;
  const void* q;
  RowLayout q_rows;
  const void* k;
  RowLayout k_rows;
  const void* tau;  // one number of the accumulation type
  double eps, scale;
  bool causal;
};

// ---- the division of the queries ----

struct NormAttentionTask : AttentionTask {
  const uint8_t* seen;  // not 0: the key may be seen; contiguous keys; null: all
  int64_t seen_batch_stride, seen_head_stride;
};

struct NormAttentionForward : NormAttentionTask {
  // Contiguous outputs.
  void* scaled;     // the queries over their divisors
  void* offset;     // of each head's keys: what may be taken off them all, often zeros
  void* deviation;  // of each row, in the accumulation type; infinity among fewer than two keys
};

struct NormAttentionBackward : NormAttentionTask {
  const void* grad_q;  // of `scaled`
  RowLayout grad_q_rows;
  const void* grad_k;  // of the keys less the offset; null: none
  RowLayout grad_k_rows;
  const void* deviation;
  // Contiguous outputs.
  void* of_q;
  void* of_k;
  void* of_divisor;  // of each row, in the accumulation type
};

// ---- the whole of attention, by the scores of some rows at a time ----

struct AttentionByScoresTask : AttentionTask {
  int64_t value_features;
  const void* v;  // rows as those of the keys
  RowLayout v_rows;
  MaskKind mask_kind;  // none, boolean, or additive of the accumulation type
  double mask_hidden;  // an additive mask hides what is at or below this number
  const void* mask;    // a row's numbers lie side by side; a broadcast dimension has stride 0
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride;
};

struct AttentionByScoresForward : AttentionByScoresTask {
  void* y;  // contiguous
};

struct AttentionByScoresBackward : AttentionByScoresTask {
  const void* grad;  // of y
  RowLayout grad_rows;
  // Contiguous outputs.
  void* of_q;
  void* of_k;
  void* of_v;
  void* of_tau;  // each row's share, in the accumulation type; null: not wanted
};

}  // namespace effkern
