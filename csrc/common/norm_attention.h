// What a kernel of NormSoftmax attention is asked to do. Formula: math/norm_attention.h.
#pragma once

#include "common/dtype.h"
#include "common/rows.h"

namespace effkern {

// Rows of queries are counted through (batch, heads, rows), of keys through (batch, key_heads,
// keys). Query head h goes with key head h / (heads / key_heads).
struct NormAttentionTask {
  DType dtype;  // of queries, keys, their outputs and gradients
  int64_t batch, heads, key_heads, rows, keys, features;
  const void* q;
  RowLayout q_rows;
  const void* k;
  RowLayout k_rows;
  const uint8_t* seen;  // not 0: the key may be seen; contiguous keys; null: all
  int64_t seen_batch_stride, seen_head_stride;
  const void* tau;  // one number of the accumulation type
  double eps, scale;
  bool causal;
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

}  // namespace effkern
