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

// The sum of one number from each thread of a group, the same bits in all of them; every thread of
// the block must call it. `scratch` has a number for each warp, and must not be the one of the call
// before.
template <class S>
__device__ __forceinline__ S sum_over_group(S value, int lanes, S* scratch) {
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (lanes <= kWarp) return value;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = lanes / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[warp] = value;
  __syncthreads();
  const S* const first = scratch + warp / warps * warps;
  S sum = 0;
  for (int i = 0; i < warps; ++i) sum += first[i];
  return sum;
}

}  // namespace effkern::cuda
