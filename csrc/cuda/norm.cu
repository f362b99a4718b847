// The choice among the norms' kernels, and the sum of shares, which is the same for all of them.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/norm.h"

namespace effkern::cuda {
namespace {

NormKernels kernels_of(Norm norm) {
  switch (norm) {
    case Norm::kRms:
      return rms_norm();
    case Norm::kCrms:
      return crms_norm();
    case Norm::kLayer:
      return layer_norm();
  }
  return {};
}

// What was summed for one column of `partial`, 32 columns a block: each of kSlices slices adds
// every kSlices-th share, then the first adds up the slices. The columns are those of grad_weight
// and, where there are more, of grad_bias; what is null is not wanted.
constexpr int kSlices = 16;
template <class W>
__global__ void __launch_bounds__(kWarp* kSlices)
    sum_shares_kernel(const Acc<W>* partial, W* grad_weight, W* grad_bias, int64_t shares,
                      int64_t columns, int64_t features) {
  Acc<W>* const sums = shared_memory<Acc<W>>();
  const int slice = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = block_index() * kWarp + threadIdx.x % kWarp;
  W* const gradient = column < features ? grad_weight : grad_bias;
  const bool wanted = column < columns && gradient != nullptr;
  Acc<W> sum = 0;
  if (wanted) {
#pragma unroll 4
    for (int64_t share = slice; share < shares; share += kSlices) {
      sum += load(partial + share * columns + column);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || !wanted) return;
  for (int i = 1; i < kSlices; ++i) sum += sums[i * kWarp + threadIdx.x];
  store(gradient + (column < features ? column : column - features), narrow<W>(sum));
}

}  // namespace

void sum_shares(const NormBackward& task, const void* partial, int64_t shares,
                cudaStream_t stream) {
  const int64_t columns = task.sums() * task.features;
  with_type(task.weight_dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    launch(sum_shares_kernel<W>, grid(ceil_div(columns, kWarp)), kWarp * kSlices,
           kWarp * kSlices * sizeof(Acc<W>), stream, static_cast<const Acc<W>*>(partial),
           static_cast<W*>(task.grad_weight), static_cast<W*>(task.grad_bias), shares, columns,
           task.features);
  });
}

void norm_forward(const NormForward& task, cudaStream_t stream) {
  kernels_of(task.norm).forward(task, stream);
}

int64_t norm_backward_workspace(const NormBackward& task) {
  return kernels_of(task.norm).backward_workspace(task);
}

void norm_backward(const NormBackward& task, void* workspace, cudaStream_t stream) {
  kernels_of(task.norm).backward(task, workspace, stream);
}

}  // namespace effkern::cuda
