// A step whose tensors are stored in other dtypes than the parameters': blocks of values are
// brought to float32 beside each other in the first-level cache, updated there, and stored.
// Included by step.h's users; accumulation is float32 throughout.
#pragma once

#include "cpu/kernels/step.h"
#include "math/quantize.h"
#include "math/rounding.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

constexpr int64_t kBlock = kQuantizedBlock;
static_assert(kChunk % kBlock == 0 && kBlock % kLanes<float> == 0);

// One block of a tensor's values; behind its end they are 0.
struct Values {
  alignas(64) float of[kBlock];
};

// ---- floating-point storage ----

template <class T>
void widen(const T* from, int64_t count, Values& to) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store(to.of + i, load(from + i));
  if (i < count) {
    store(to.of + i, load_first(from + i, count - i));
    i += kLanes<float>;
  }
  for (; i < kBlock; i += kLanes<float>) store(to.of + i, Floats{});
}

// `from` may be read up to the end of its last vector.
template <class T>
void narrow(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load(from + i), count - i);
}

// ---- stochastic rounding ----

EFFKERN_INLINE Words lane_numbers() {
  Words lanes = {};
  for (uint32_t i = 0; i < kLanes<float>; ++i) lanes[i] = i;
  return lanes;
}

// `index` is that of the block's first element in its tensor.
inline void narrow_stochastically(const float* from, int64_t count, uint32_t seed, int64_t index,
                                  BFloat16* to) {
  const uint64_t first = static_cast<uint64_t>(index);
  const uint32_t stream = rounding_stream(seed, static_cast<uint32_t>(first >> 32));
  Words lower = lane_numbers() + static_cast<uint32_t>(first);
  for (int64_t i = 0; i < count;
       i += kLanes<float>, lower += static_cast<uint32_t>(kLanes<float>)) {
    const Floats x = load(from + i);
    const Words bits = bit_cast<Words>(x);
    const Words rounded = round_stochastically(bits, random_bits(stream, lower));
    const Words nearest = __builtin_convertvector(to_bfloat16(x), Words);
    const Words finite = bit_cast<Words>((bits & 0x7f800000u) != 0x7f800000u);
    const Halves chosen = __builtin_convertvector((rounded & finite) | (nearest & ~finite), Halves);
    const int64_t left = count - i;
    __builtin_memcpy(to + i, &chosen,
                     static_cast<size_t>(left < kLanes<float> ? left : kLanes<float>) * 2);
  }
}

// ---- states in 8 bits ----

EFFKERN_INLINE Words magnitude_bits(Floats x) { return bit_cast<Words>(x) & 0x7fffffffu; }

// Floating-point numbers of magnitude below 2^22, to the nearest integer, ties to even.
EFFKERN_INLINE Ints nearest(Floats x) { return bit_cast<Ints>(x + 12582912.0f) - 0x4b400000; }

template <class Code>
void dequantize(const Code* codes, float scale, int64_t count, Values& to) {
  constexpr bool kSigned = static_cast<Code>(-1) < 0;
  Code padded[kBlock] = {};
  if (count < kBlock) {
    __builtin_memcpy(padded, codes, static_cast<size_t>(count));
    codes = padded;
  }
  for (int64_t i = 0; i < kBlock; i += kLanes<float>) {
    const Floats code = __builtin_convertvector(load_codes(codes + i), Floats);
    store(to.of + i, kSigned ? signed_value(code, scale) : unsigned_value(code, scale));
  }
}

// The largest magnitude. As bits, magnitudes of float32 are ordered like integers, NaN above all.
inline float largest_magnitude(const Values& values) {
  Words most = {};
  for (int64_t i = 0; i < kBlock; i += kLanes<float>) {
    const Words one = magnitude_bits(load(values.of + i));
    most = one > most ? one : most;
  }
  uint32_t bits = 0;
  for (int64_t i = 0; i < kLanes<float>; ++i) bits = most[i] > bits ? most[i] : bits;
  return bit_cast<float>(bits);
}

template <class Code>
void quantize(const Values& from, int64_t count, Code* codes, float* scale) {
  constexpr bool kSigned = static_cast<Code>(-1) < 0;
  const float largest = largest_magnitude(from);
  *scale = largest;
  const float factor = kSigned ? codes_per_scale(largest) : codes_per_root(largest);
  Code padded[kBlock];
  Code* const made = count < kBlock ? padded : codes;
  for (int64_t i = 0; i < kBlock; i += kLanes<float>) {
    const Floats x = load(from.of + i);
    Floats code;
    if constexpr (kSigned) {
      code = signed_code(x, factor);
    } else {
      code = unsigned_code(QuickFloats{x}, factor).of;
      code = (x > 0) & (code < 1) ? Floats{} + 1 : code;
    }
    store_codes(made + i, nearest(code));
  }
  if (count < kBlock) __builtin_memcpy(codes, padded, static_cast<size_t>(count));
}

// ---- a block of all of a tensor's arrays ----

// Parameters and gradients of float32 stay where they are, in whole blocks; all else is brought
// into `Values`.
template <class Rule>
class Block {
 public:
  float *param, *grad;
  float factor;  // by which the gradient remains to be multiplied
  Values state[kMostStates];

  Block(const StepTask& task, const Rule& rule)
      : factor(static_cast<float>(task.factor)), task_(task), variant_(rule.variant()) {}

  // Elements [begin, begin + count) of the tensor of `row`; count is at most kBlock.
  void load_states(const int64_t* row, int64_t begin, int64_t count) {
    for (int s = 0; s < kMostStates; ++s) {
      if (Rule::has_state(variant_, s)) load_state(row, s, begin, count);
    }
  }
  void load_param(const int64_t* row, int64_t begin, int64_t count) {
    const bool is_float = task_.storage.masters || task_.dtype == DType::kFloat32;
    const int64_t column = task_.storage.masters ? kMaster : kParam;
    if (is_float) {
      param = in_place(address<float>(row, column) + begin, count, param_);
    } else {
      load_as_param(row, column, begin, count, param_);
      param = param_.of;
    }
  }
  void load_grad(const int64_t* row, int64_t begin, int64_t count) {
    if (task_.dtype == DType::kFloat32) {
      grad = in_place(address<float>(row, kGrad) + begin, count, grad_);
    } else {
      load_as_param(row, kGrad, begin, count, grad_);
      grad = grad_.of;
    }
  }

  void store_states(const int64_t* row, int64_t begin, int64_t count) const {
    for (int s = 0; s < kMostStates; ++s) {
      if (Rule::has_state(variant_, s)) store_state(row, s, begin, count);
    }
  }
  void store_param(const int64_t* row, int64_t begin, int64_t count, double t) const {
    const bool is_float = task_.storage.masters || task_.dtype == DType::kFloat32;
    if (is_float && param == param_.of) {
      narrow(param, count, address<float>(row, task_.storage.masters ? kMaster : kParam) + begin);
    }
    if (task_.dtype == DType::kFloat32) return;
    if (task_.storage.stochastic) {
      narrow_stochastically(param, count, rounding_seed(row[kKey], t), begin,
                            address<BFloat16>(row, kParam) + begin);
    } else {
      store_as_param(row, kParam, begin, count, param);
    }
  }

 private:
  static float* in_place(float* at, int64_t count, Values& copy) {
    if (count == kBlock) return at;
    widen(at, count, copy);
    return copy.of;
  }

  void load_as_param(const int64_t* row, int64_t column, int64_t begin, int64_t count,
                     Values& to) const {
    switch (task_.dtype) {
      case DType::kFloat64:  // never comes here
      case DType::kFloat32:
        return widen(address<float>(row, column) + begin, count, to);
      case DType::kBFloat16:
        return widen(address<BFloat16>(row, column) + begin, count, to);
      case DType::kFloat16:
        return widen(address<Float16>(row, column) + begin, count, to);
    }
  }
  void store_as_param(const int64_t* row, int64_t column, int64_t begin, int64_t count,
                      const float* from) const {
    switch (task_.dtype) {
      case DType::kFloat64:
      case DType::kFloat32:
        return narrow(from, count, address<float>(row, column) + begin);
      case DType::kBFloat16:
        return narrow(from, count, address<BFloat16>(row, column) + begin);
      case DType::kFloat16:
        return narrow(from, count, address<Float16>(row, column) + begin);
    }
  }

  void load_state(const int64_t* row, int s, int64_t begin, int64_t count) {
    const int64_t column = kState0 + s;
    switch (task_.storage.state) {
      case StateType::kAsParam:
        return load_as_param(row, column, begin, count, state[s]);
      case StateType::kFloat32:
        return widen(address<float>(row, column) + begin, count, state[s]);
      case StateType::kBFloat16:
        return widen(address<BFloat16>(row, column) + begin, count, state[s]);
      case StateType::kInt8: {
        const float scale = address<float>(row, kScale0 + s)[begin / kBlock];
        if (Rule::is_signed(s)) {
          return dequantize(address<int8_t>(row, column) + begin, scale, count, state[s]);
        }
        return dequantize(address<uint8_t>(row, column) + begin, scale, count, state[s]);
      }
    }
  }
  void store_state(const int64_t* row, int s, int64_t begin, int64_t count) const {
    const int64_t column = kState0 + s;
    switch (task_.storage.state) {
      case StateType::kAsParam:
        return store_as_param(row, column, begin, count, state[s].of);
      case StateType::kFloat32:
        return narrow(state[s].of, count, address<float>(row, column) + begin);
      case StateType::kBFloat16:
        return narrow(state[s].of, count, address<BFloat16>(row, column) + begin);
      case StateType::kInt8: {
        float* const scale = address<float>(row, kScale0 + s) + begin / kBlock;
        if (Rule::is_signed(s)) {
          return quantize(state[s], count, address<int8_t>(row, column) + begin, scale);
        }
        return quantize(state[s], count, address<uint8_t>(row, column) + begin, scale);
      }
    }
  }

  const StepTask& task_;
  int variant_;
  Values param_, grad_;
};

EFFKERN_INLINE Floats floats(Floats x) { return x; }
EFFKERN_INLINE Floats floats(QuickFloats x) { return x.of; }

// V: Floats, or QuickFloats where states of 8 bits leave the time.
template <class Rule, int kVariant, class V>
void update_block(Block<Rule>& block, int64_t count,
                  const typename Rule::template Scalars<float>& scalars) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    V param{load(block.param + i)}, grad{load(block.grad + i)}, state[kMostStates] = {};
    if (block.factor != 1) grad = grad * block.factor;
    for (int s = 0; s < kMostStates; ++s) {
      if (Rule::has_state(kVariant, s)) state[s] = V{load(block.state[s].of + i)};
    }
    Rule::template update<kVariant>(param, grad, state, scalars);
    store(block.param + i, floats(param));
    for (int s = 0; s < kMostStates; ++s) {
      if (Rule::has_state(kVariant, s)) store(block.state[s].of + i, floats(state[s]));
    }
  }
  // What a formula makes of the zeros behind the end must not be taken for values.
  for (int s = 0; s < kMostStates; ++s) {
    for (int64_t i = count; i < kBlock && Rule::has_state(kVariant, s); ++i)
      block.state[s].of[i] = 0;
  }
}

// Calls body(row, begin, count) for each block of the elements [begin, end), counted through all
// tensors; a block belongs to whoever has its first element.
template <class Body>
EFFKERN_INLINE void for_each_block(const StepTask& task, int64_t begin, int64_t end,
                                   const Body& body) {
  int64_t first = 0;  // the number of elements in the tensors before this one
  for (int64_t i = 0; i < task.tensors && first < end; ++i) {
    const int64_t* const row = task.table + i * kTableColumns;
    const int64_t numel = row[kNumel];
    const int64_t from = begin > first ? (begin - first + kBlock - 1) / kBlock * kBlock : 0;
    const int64_t to = end - first < numel ? end - first : numel;
    for (int64_t b = from; b < to; b += kBlock) {
      body(row, b, numel - b < kBlock ? numel - b : kBlock);
    }
    first += numel;
  }
}

template <class Rule, int kVariant>
void mixed(const StepTask& task, const Rule& rule, int64_t begin, int64_t end) {
  ScalarsOf<Rule, float> scalars(task, rule);
  Block<Rule> block(task, rule);
  for_each_block(task, begin, end, [&](const int64_t* row, int64_t from, int64_t count) {
    block.load_param(row, from, count);
    block.load_grad(row, from, count);
    block.load_states(row, from, count);
    if (task.storage.state == StateType::kInt8) {
      update_block<Rule, kVariant, QuickFloats>(block, count, scalars.at(row));
    } else {
      update_block<Rule, kVariant, Floats>(block, count, scalars.at(row));
    }
    block.store_states(row, from, count);
    block.store_param(row, from, count, scalars.step());
  });
}

template <class Rule, int kVariant = 0>
void mixed_variant(const StepTask& task, const Rule& rule, int64_t begin, int64_t end) {
  if (rule.variant() == kVariant) return mixed<Rule, kVariant>(task, rule, begin, end);
  if constexpr (kVariant + 1 < Rule::kVariants) {
    mixed_variant<Rule, kVariant + 1>(task, rule, begin, end);
  }
}

// A step in whatever way its tensors are stored.
template <class Rule>
void any_step(const StepTask& task, const Rule& rule, int64_t begin, int64_t end) {
  if (task.storage.plain()) return step(task, rule, begin, end);
  mixed_variant(task, rule, begin, end);
}

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
