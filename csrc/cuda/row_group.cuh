// How rows are given to threads: a row to a group of threads, as many groups to a block as make it
// large enough.
#pragma once

#include "cuda/launch.cuh"

namespace effkern::cuda {

// A group is a power of two up to a warp, or whole warps. Its threads take a row's packs in turn:
// lane, lane + lanes, ...
struct RowGroups {
  int lanes;   // threads of a group
  int groups;  // of a block; lanes x groups is a multiple of a warp
  int threads() const { return lanes * groups; }
  int warps() const { return threads() / kWarp; }
};

// For rows of `packs` packs, at most `held` of them a thread, in blocks of about `threads` threads.
inline RowGroups row_groups(int64_t packs, int held, int threads) {
  int lanes = 1;
  // Eight lanes of 16 bytes fill a cache line; beyond that each thread rather takes several packs.
  while (lanes < kWarp && lanes < packs && (lanes < 8 || int64_t{lanes} * held / 2 < packs)) {
    lanes *= 2;
  }
  if (int64_t{lanes} * held < packs) {
    lanes = static_cast<int>(ceil_div(packs, int64_t{held} * kWarp)) * kWarp;
  }
  return RowGroups{lanes, lanes < threads ? threads / lanes : 1};
}

// Of kNumbers numbers from each thread of a group each combined over the group, from `none` on, the
// same bits in all threads; every thread of the block must call it. `scratch` has kNumbers numbers
// for each warp of the block, and must not be the one of the call before.
template <int kNumbers, class S, class Combine>
__device__ __forceinline__ void combine_over_group(S (&values)[kNumbers], int lanes, S* scratch,
                                                   S none, const Combine& combine) {
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
    for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2) {
      values[n] = combine(values[n], __shfl_xor_sync(0xffffffffu, values[n], offset));
    }
  }
  if (lanes <= kWarp) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = lanes / kWarp;
  const int all_warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
    if (threadIdx.x % kWarp == 0) scratch[n * all_warps + warp] = values[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
    const S* const first = scratch + n * all_warps + warp / warps * warps;
    values[n] = none;
#pragma unroll 8  // all at once would take as many registers
    for (int i = 0; i < warps; ++i) values[n] = combine(values[n], first[i]);
  }
}

template <int kSums, class S>
__device__ __forceinline__ void sum_over_group(S (&values)[kSums], int lanes, S* scratch) {
  combine_over_group(values, lanes, scratch, S(0), [](S a, S b) { return a + b; });
}

// The same for one number.
template <class S>
__device__ __forceinline__ S sum_over_group(S value, int lanes, S* scratch) {
  S values[1] = {value};
  sum_over_group(values, lanes, scratch);
  return values[0];
}

}  // namespace effkern::cuda
