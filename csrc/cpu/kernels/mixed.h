// A step whose tensors are stored in other dtypes than the parameters': blocks of values are
// brought to float32 beside each other in the first-level cache, updated there, and stored.
// Included by step.h's users; accumulation is float32 throughout.
#pragma once

#include "cpu/kernels/coded_block.h"
#include "cpu/kernels/step.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

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

  // The scale of a state in 8 bits.
  static float* scale_of(const int64_t* row, int s, int64_t begin) {
    return address<float>(row, kScale0 + s) + begin / kBlock;
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
        Codes copy;
        const uint8_t* const codes = copy.at(address<uint8_t>(row, column) + begin, count);
        const float scale = *scale_of(row, s, begin);
        for (int64_t i = 0; i < kBlock; i += kLanes<float>) {
          store(state[s].of + i, decoded(codes + i, scale, Rule::is_signed(s)));
        }
        return;
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
        Values parts;
        Words most = {};
        for (int64_t i = 0; i < count; i += kLanes<float>) {
          const Floats x = load(state[s].of + i);
          most = larger_magnitude(most, x);
          store(parts.of + i, coded_part(x, Rule::is_signed(s)));
        }
        const float scale = *scale_of(row, s, begin) = largest_lane(most);
        return encode_first(parts, count, codes_per_part(scale, Rule::is_signed(s)),
                            Rule::is_signed(s), address<uint8_t>(row, column) + begin);
      }
    }
  }

  const StepTask& task_;
  int variant_;
  Values param_, grad_;
};

template <class Rule, int kVariant>
void update_block(Block<Rule>& block, int64_t count,
                  const typename Rule::template Scalars<float>& scalars) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    Floats param = load(block.param + i), grad = load(block.grad + i), state[kMostStates] = {};
    if (block.factor != 1) grad = grad * block.factor;
    for (int s = 0; s < kMostStates; ++s) {
      if (Rule::has_state(kVariant, s)) state[s] = load(block.state[s].of + i);
    }
    Rule::template update<kVariant>(param, grad, state, scalars);
    store(block.param + i, param);
    for (int s = 0; s < kMostStates; ++s) {
      if (Rule::has_state(kVariant, s)) store(block.state[s].of + i, state[s]);
    }
  }
}

// The same where states are in 8 bits. Their values stay in registers. What codes are made of waits
// in the first-level cache until the block's largest magnitudes are known, and until the next block
// is updated: the update waits for roots and quotients, and the codes fill that time.
template <class Rule, int kVariant>
class CodedStates {
 public:
  void update(Block<Rule>& block, const int64_t* row, int64_t begin, int64_t count,
              const typename Rule::template Scalars<float>& scalars) {
    Waiting& next = sets_[1 - at_];
    if (count < kBlock) {
      finish();
      update_set<false>(block, row, begin, count, scalars, next, next);
      for (int s = 0; s < kMostStates; ++s) {
        if (!Rule::has_state(kVariant, s)) continue;
        encode_first(next.parts[s], count, next.factor[s], Rule::is_signed(s), next.codes[s]);
      }
      return;
    }
    if (waits_) {
      update_set<true>(block, row, begin, count, scalars, next, sets_[at_]);
    } else {
      update_set<false>(block, row, begin, count, scalars, next, next);
    }
    at_ = 1 - at_;
    waits_ = true;
  }

  // Stores the codes that still wait.
  void finish() {
    for (int64_t i = 0; i < kBlock && waits_; i += kCodes) encode_waiting(sets_[at_], i);
    waits_ = false;
  }

 private:
  // One block: of each state what its codes are made of, and where they go.
  struct Waiting {
    Values parts[kMostStates];
    float factor[kMostStates];
    uint8_t* codes[kMostStates];
  };

  EFFKERN_INLINE void encode_waiting(const Waiting& set, int64_t i) {
    for (int s = 0; s < kMostStates; ++s) {
      if (!Rule::has_state(kVariant, s)) continue;
      encode(set.parts[s], i, set.factor[s], Rule::is_signed(s), set.codes[s]);
    }
  }

  // Updates a block into `next`; where kEncodes, stores the codes of `last` meanwhile.
  template <bool kEncodes>
  void update_set(const Block<Rule>& block, const int64_t* row, int64_t begin, int64_t count,
                  typename Rule::template Scalars<float> scalars, Waiting& next,
                  const Waiting& last) {
    Codes copies[kMostStates];
    const uint8_t* codes[kMostStates] = {};
    float scale[kMostStates] = {};
    for (int s = 0; s < kMostStates; ++s) {
      if (!Rule::has_state(kVariant, s)) continue;
      next.codes[s] = address<uint8_t>(row, kState0 + s) + begin;
      codes[s] = copies[s].at(next.codes[s], count);
      scale[s] = *block.scale_of(row, s, begin);
    }
    float* const params = block.param;
    const float* const grads = block.grad;
    scalars.sign *= block.factor;  // one product less
    Words most[kMostStates] = {};
    // `lanes` of the vector are values; behind them what a formula makes of zeros is none.
    const auto update_vector = [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
      Floats param = load(params + i), grad = load(grads + i), state[kMostStates] = {};
      for (int s = 0; s < kMostStates; ++s) {
        if (!Rule::has_state(kVariant, s)) continue;
        state[s] = decoded(codes[s] + i, scale[s], Rule::is_signed(s));
      }
      Rule::template update<kVariant>(param, grad, state, scalars);
      store(params + i, param);
      for (int s = 0; s < kMostStates; ++s) {
        if (!Rule::has_state(kVariant, s)) continue;
        store(next.parts[s].of + i, coded_part(state[s], Rule::is_signed(s)));
        most[s] = larger_magnitude(most[s], first_lanes(state[s], lanes));
      }
    };
    int64_t i = 0;
    for (; i + kCodes <= count; i += kCodes) {
      prefetch_next(params + i, grads + i, codes, i);
      for (int64_t j = i; j < i + kCodes; j += kLanes<float>) update_vector(j, kLanes<float>);
      if constexpr (kEncodes) encode_waiting(last, i);
    }
    for (; i < count; i += kLanes<float>) {
      update_vector(i, count - i < kLanes<float> ? count - i : kLanes<float>);
    }
    for (int s = 0; s < kMostStates; ++s) {
      if (!Rule::has_state(kVariant, s)) continue;
      const float largest = *block.scale_of(row, s, begin) = largest_lane(most[s]);
      next.factor[s] = codes_per_part(largest, Rule::is_signed(s));
    }
  }

  // Brings the same place of the next block but one near, where there is one: the hardware follows
  // a stream only to the end of a page, and one block takes less time than memory.
  EFFKERN_INLINE void prefetch_next(const float* params, const float* grads,
                                    const uint8_t* const* codes, int64_t i) {
    constexpr int64_t kLine = 64 / sizeof(float), kAhead = 2 * kBlock;
    for (int64_t j = kAhead; j < kAhead + kCodes; j += kLine) {
      __builtin_prefetch(params + j, 1);
      __builtin_prefetch(grads + j);
    }
    for (int s = 0; s < kMostStates; ++s) {
      if (Rule::has_state(kVariant, s)) __builtin_prefetch(codes[s] + kAhead + i, 1);
    }
  }

  Waiting sets_[2];
  int at_ = 0;          // which set waits
  bool waits_ = false;  // whether one does
};

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
  CodedStates<Rule, kVariant> coded;
  for_each_block(task, begin, end, [&](const int64_t* row, int64_t from, int64_t count) {
    block.load_param(row, from, count);
    block.load_grad(row, from, count);
    if (task.storage.state == StateType::kInt8) {
      coded.update(block, row, from, count, scalars.at(row));
    } else {
      block.load_states(row, from, count);
      update_block<Rule, kVariant>(block, count, scalars.at(row));
      block.store_states(row, from, count);
    }
    block.store_param(row, from, count, scalars.step());
  });
  coded.finish();
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
