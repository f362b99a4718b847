// What the forward and the backward kernels of NormSoftmax share: a task with types, how packs of a
// row come from memory with their masks, and what is found of a row that its threads hold.
#pragma once

#include <cmath>

#include "common/norm_softmax.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/row_group.cuh"
#include "math/norm_softmax.h"

namespace effkern::cuda {

constexpr int kLongThreads = 1024;  // the most that share a row which is not held

// A tensor's rows. Packs of V > 1 elements are of dense, aligned rows; single elements may have any
// stride.
template <class T, int V>
struct StridedPacks {
  T* data;
  StridedRows layout;

  __device__ __forceinline__ T* row(int64_t row) const {
    return data + row_offset(layout.rows, row);
  }
  __device__ __forceinline__ int64_t place(int64_t pack) const {
    return V > 1 ? pack * V : pack * layout.stride;
  }
};

// What a thread needs of a pack of a mask: which of its elements are visible, and what is added.
template <class S, int V>
struct PackMask {
  unsigned visible;  // bit v for element v
  S bias[V];
};

template <class T, int V>
struct Mask {
  using S = Acc<T>;
  const void* data;
  MaskKind kind;
  bool in_packs;  // dense and aligned
  S hidden;
  StridedRows layout;

  __device__ __forceinline__ bool adds() const {
    return kind == MaskKind::kAsInput || kind == MaskKind::kAccumulated;
  }

  // Of pack number `pack` of a row.
  __device__ __forceinline__ PackMask<S, V> at(int64_t row, int64_t pack) const {
    PackMask<S, V> mask{(1u << V) - 1, {}};
    if (kind == MaskKind::kNone) return mask;
    const int64_t offset = row_offset(layout.rows, row) + pack * V * layout.stride;
    if (kind == MaskKind::kBool) {
      const auto bools = load_pack(static_cast<const unsigned char*>(data) + offset);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (bools.value[v] == 0) mask.visible &= ~(1u << v);
      }
    } else if (kind == MaskKind::kAccumulated) {
      add(mask, load_pack(static_cast<const S*>(data) + offset));
    } else if constexpr (sizeof(T) < sizeof(S)) {
      add(mask, load_pack(static_cast<const T*>(data) + offset));
    }
    return mask;
  }

 private:
  template <class M>
  __device__ __forceinline__ Pack<M, V> load_pack(const M* p) const {
    if (in_packs) return load<V>(p);
    Pack<M, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = load(p + v * layout.stride);
    return pack;
  }
  template <class M>
  __device__ __forceinline__ void add(PackMask<S, V>& mask, const Pack<M, V>& biases) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mask.bias[v] = widen(biases.value[v]);
      if (mask.bias[v] <= hidden) mask.visible &= ~(1u << v);
    }
  }
};

template <class T, int V>
struct SoftmaxArguments {
  using S = Acc<T>;
  StridedPacks<const T, V> x;
  Mask<T, V> mask;
  const S* tau_pointer;
  S tau_value, eps;
  int64_t rows, features;

  __device__ __forceinline__ S tau() const {
    return tau_pointer == nullptr ? tau_value : load(tau_pointer);
  }
};

// ---- a row that its threads hold ----

// How many packs of V elements a thread holds.
template <class T, int V>
constexpr int kHeldPacks = (sizeof(T) == 8 ? 8 : 16) / V;

// A thread's packs of a row, lane, lane + lanes, ...
template <class S, int V, int kPacks>
struct HeldRow {
  S x[kPacks][V];
  unsigned visible;  // bit k * V + v; not that of an element which does not exist

  __device__ __forceinline__ bool sees(int k, int v) const { return visible >> (k * V + v) & 1; }
};

// What is found of a row. A logit is (x - origin) * inverse + bias - top, at most 0.
template <class S>
struct RowFound {
  S count, mean, squares, origin, top, inverse;
  SoftmaxDivisor<S> divisor;
};

// Numbers of shared memory for each warp of a block that `find` takes.
constexpr int kFindScratch = 5;

// Reads a row's packs; `left`: of them from the thread's first on, none for a group past the last
// row. Biases go to bias(k, v, value).
template <class T, int V, int kPacks, class Bias>
__device__ __forceinline__ HeldRow<Acc<T>, V, kPacks> read_row(const SoftmaxArguments<T, V>& p,
                                                               int64_t row, int lane, int lanes,
                                                               int left, const Bias& bias) {
  HeldRow<Acc<T>, V, kPacks> held;
  const T* const x = p.x.row(left > 0 ? row : 0);
  Pack<T, V> packs[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    packs[k] = k * lanes < left ? load<V>(x + p.x.place(lane + k * lanes)) : Pack<T, V>{};
  }
  held.visible = 0;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    PackMask<Acc<T>, V> mask{};
    if (k * lanes < left) mask = p.mask.at(row, lane + k * lanes);
    held.visible |= mask.visible << (k * V);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      held.x[k][v] = mask.visible >> v & 1 ? widen(packs[k].value[v]) : Acc<T>(0);
      bias(k, v, mask.bias[v]);
    }
  }
  return held;
}

// The mean, the sum of squares and so on; x becomes x - mean. bias(k, v): what read_row gave.
template <class T, int V, int kPacks, class Bias>
__device__ __forceinline__ RowFound<Acc<T>> find(HeldRow<Acc<T>, V, kPacks>& held,
                                                 const SoftmaxArguments<T, V>& p, int lanes,
                                                 bool adds, Acc<T>* scratch, const Bias& bias) {
  using S = Acc<T>;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const S lowest = S(-INFINITY);
  const auto larger_of = [](S a, S b) { return larger(a, b); };
  RowFound<S> row;

  S sums[2] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[0] += held.x[k][v];
  }
  sums[1] = static_cast<S>(__popc(held.visible));
  sum_over_group(sums, lanes, scratch);
  row.count = p.mask.kind == MaskKind::kNone ? static_cast<S>(p.features) : sums[1];
  row.mean = sums[0] / row.count;
  scratch += 2 * warps;

  S about[2] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      held.x[k][v] = held.sees(k, v) ? held.x[k][v] - row.mean : S(0);
      about[0] += held.x[k][v] * held.x[k][v];
      about[1] += held.x[k][v];
    }
  }
  sum_over_group(about, lanes, scratch);
  scratch += 2 * warps;
  // The rounding of the mean, found beside numbers that are small where all are alike.
  const S shift = about[1] / row.count;
  row.squares = larger(about[0] - about[1] * shift, S(0));
  row.divisor = softmax_divisor(row.squares, row.count, p.tau(), p.eps);
  row.inverse = S(1) / row.divisor.value;

  S largest[1] = {lowest};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      held.x[k][v] = held.sees(k, v) ? held.x[k][v] - shift : S(0);
      const S number =
          adds ? normalised_logit(held.x[k][v], S(0), row.inverse) + bias(k, v) : held.x[k][v];
      if (held.sees(k, v)) largest[0] = larger(largest[0], number);
    }
  }
  combine_over_group(largest, lanes, scratch, lowest, larger_of);
  row.origin = adds ? S(0) : largest[0];
  row.top = adds ? largest[0] : S(0);
  return row;
}

// An element's part of the distribution, up to a factor.
template <class S>
__device__ __forceinline__ S exponential_of(const RowFound<S>& row, S centred, S bias) {
  return exponential(normalised_logit(centred, row.origin, row.inverse) + bias - row.top);
}

// ---- a row that is read several times, by a block ----

// The visible numbers of a part of a row: how many, their mean, the sum of squares about it.
template <class S>
struct Moments {
  S count, mean, squares;

  __device__ __forceinline__ void add(const Moments& other) {
    if (other.count == 0) return;
    const S both = count + other.count, distance = other.mean - mean;
    mean += distance * (other.count / both);
    squares += other.squares + distance * distance * (count * (other.count / both));
    count = both;
  }
};

template <class T, int V>
__device__ __forceinline__ Moments<Acc<T>> moments_of(const Pack<T, V>& pack, unsigned visible) {
  Moments<Acc<T>> found{static_cast<Acc<T>>(__popc(visible)), 0, 0};
  if (visible == 0) return found;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (visible >> v & 1) found.mean += widen(pack.value[v]);
  }
  found.mean /= found.count;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Acc<T> c = widen(pack.value[v]) - found.mean;
    if (visible >> v & 1) found.squares += c * c;
  }
  return found;
}

constexpr int kLongFindScratch = 4;

// The first read of a long row. The origin is the mean; the top is not found.
template <class T, int V>
__device__ __forceinline__ RowFound<Acc<T>> find_long(const SoftmaxArguments<T, V>& p, int64_t row,
                                                      Acc<T>* scratch) {
  using S = Acc<T>;
  const T* const x = p.x.row(row);
  Moments<S> mine{};
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < p.features / V; i += blockDim.x) {
    mine.add(moments_of(load<V>(x + p.x.place(i)), p.mask.at(row, i).visible));
  }
  RowFound<S> found{};
  S sums[2] = {mine.count, mine.count * mine.mean};
  if (mine.count == 0) sums[1] = 0;
  sum_over_group(sums, static_cast<int>(blockDim.x), scratch);
  found.count = sums[0];
  found.mean = sums[1] / sums[0];
  const S distance = mine.count == 0 ? S(0) : mine.mean - found.mean;
  S about[2] = {mine.squares + mine.count * distance * distance, mine.count * distance};
  sum_over_group(about, static_cast<int>(blockDim.x), scratch + 2 * blockDim.x / kWarp);
  const S shift = about[1] / found.count;
  found.mean += shift;
  found.squares = larger(about[0] - about[1] * shift, S(0));
  found.divisor = softmax_divisor(found.squares, found.count, p.tau(), p.eps);
  found.inverse = S(1) / found.divisor.value;
  return found;
}

// The largest of some logits, and sums over their exponentials less it.
template <class S, class Sums>
struct LongSums {
  S top = S(-INFINITY);
  Sums sums = {};

  __device__ __forceinline__ void raise_to(S new_top) {
    sums.scale(new_top == top ? S(1) : exponential(top - new_top));
    top = new_top;
  }
};

template <class T, int V>
__device__ __forceinline__ Acc<T> logit_of(const RowFound<Acc<T>>& row, const Pack<T, V>& x,
                                           const PackMask<Acc<T>, V>& mask, int v) {
  // Divided: a product with the rounded inverse would move all logits of a long row one way.
  return (widen(x.value[v]) - row.mean) / row.divisor.value + mask.bias[v];
}

// Adds the visible elements of a pack: add(sums, v, exponential).
template <class T, int V, class Sums, class Add>
__device__ __forceinline__ void add_pack(LongSums<Acc<T>, Sums>& all, const RowFound<Acc<T>>& row,
                                         const Pack<T, V>& x, const PackMask<Acc<T>, V>& mask,
                                         const Add& add) {
  Acc<T> z[V], top = all.top;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    z[v] = logit_of(row, x, mask, v);
    if (mask.visible >> v & 1) top = larger(top, z[v]);
  }
  all.raise_to(top);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (mask.visible >> v & 1) add(all.sums, v, exponential(z[v] - top));
  }
}

// Raises the sums of all threads of a block to one top; `scratch` has a number for each warp.
template <class S, class Sums>
__device__ __forceinline__ void raise_together(LongSums<S, Sums>& mine, S* scratch) {
  S top[1] = {mine.top};
  combine_over_group(top, static_cast<int>(blockDim.x), scratch, LongSums<S, Sums>().top,
                     [](S a, S b) { return larger(a, b); });
  mine.raise_to(top[0]);
}

// ---- the host's side ----

// Whether rows can be read in packs of V elements of `size` bytes.
template <int V>
bool in_packs(const void* data, const StridedRows& layout, int64_t features, int64_t size) {
  const int64_t bytes = V * size < 16 ? V * size : 16;
  const RowLayout& rows = layout.rows;
  return layout.stride == 1 && features % V == 0 &&
         reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0 &&
         rows.stride0 * size % bytes == 0 && rows.stride1 * size % bytes == 0 &&
         rows.stride2 * size % bytes == 0;
}

template <class T, int V>
SoftmaxArguments<T, V> softmax_arguments(const NormSoftmaxTask& task) {
  using S = Acc<T>;
  const int64_t mask_size = task.mask_kind == MaskKind::kBool          ? 1
                            : task.mask_kind == MaskKind::kAccumulated ? sizeof(S)
                                                                       : sizeof(T);
  const bool mask_in_packs = in_packs<V>(task.mask, task.mask_rows, task.features, mask_size);
  return {
      {static_cast<const T*>(task.x), task.x_rows},
      {task.mask, task.mask_kind, mask_in_packs, static_cast<S>(task.mask_hidden), task.mask_rows},
      static_cast<const S*>(task.tau),
      static_cast<S>(task.tau_value),
      static_cast<S>(task.eps),
      task.rows,
      task.features};
}

// Neighbouring rows of strided elements share cache lines: a block then takes more of them.
inline int threads_of_a_block(const NormSoftmaxTask& task) {
  return task.x_rows.stride == 1 ? 128 : 512;
}

}  // namespace effkern::cuda
