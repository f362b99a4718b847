// The sum of squares of all gradients of a table in one launch: a number for each block of kChunk
// elements, which the last block adds in an order that depends on their count alone.
//
// Bytes: each gradient is read once. A block also reads its chunk row and two numbers of the table
// and writes its sum; of several blocks each takes a ticket, the first tensor's, and the last reads
// the sums and writes the result.
#include "cuda/chunk.cuh"
#include "cuda/row_group.cuh"

namespace effkern::cuda {
namespace {

template <int V, class T>
__device__ __forceinline__ double squares_of(const T* grads) {
  const Pack<T, V> pack = load<V>(grads);
  double sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const double grad = widen(pack.value[v]);
    sum += grad * grad;
  }
  return sum;
}

// The gradients of a block's chunk.
template <class T>
struct GradChunk {
  const T* grad;
  int count, vectors;
};

// Shared memory.
template <class T>
struct Squares {
  GradChunk<T> chunk;
  double scratch[2][kStepThreads / kWarp];
  bool last;
};

template <class T>
__device__ __forceinline__ void read_chunk(GradChunk<T>& chunk, const StepLaunch& task) {
  const int32_t* const chunk_row = task.chunks + block_index() * kChunkColumns;
  const int64_t* const row = task.table + load(chunk_row + kChunkTensor) * int64_t{kTableColumns};
  const int64_t start = load(chunk_row + kChunkIndex) * kChunk;
  const int64_t left = load(row + kNumel) - start;
  chunk.grad = reinterpret_cast<const T*>(load(row + kGrad)) + start;
  chunk.count = static_cast<int>(left < kChunk ? left : kChunk);
  chunk.vectors = reinterpret_cast<uintptr_t>(chunk.grad) % 16 == 0 ? chunk.count / kWidth<T> : 0;
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, 4)
    squares_kernel(StepLaunch task, double* of_blocks, double* result) {
  Squares<T>* const shared = shared_memory<Squares<T>>();
  if (threadIdx.x == 0) read_chunk(shared->chunk, task);
  __syncthreads();
  const GradChunk<T> chunk = shared->chunk;
  double sum = 0;
  for_each_vector<T>(chunk, [&](auto width, int offset) {
    sum += squares_of<decltype(width)::value>(chunk.grad + offset);
  });
  sum = sum_over_group(sum, kStepThreads, shared->scratch[0]);
  if (threadIdx.x == 0) {
    store(of_blocks + block_index(), sum);
    shared->last = is_last({reinterpret_cast<unsigned*>(task.table + kTicket), task.chunk_count});
  }
  __syncthreads();
  if (!shared->last) return;
  sum = 0;
  for (int64_t i = threadIdx.x; i < task.chunk_count; i += kStepThreads) sum += load(of_blocks + i);
  sum = sum_over_group(sum, kStepThreads, shared->scratch[1]);
  if (threadIdx.x == 0) store(result, sum);
}

}  // namespace

int64_t squares_workspace(const StepLaunch& task) {
  return task.chunk_count * static_cast<int64_t>(sizeof(double));
}

void squares(const StepLaunch& task, void* workspace, double* result, cudaStream_t stream) {
  if (task.chunk_count == 0) {
    return check(cudaMemsetAsync(result, 0, sizeof(double), stream), "a number could not be set");
  }
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(squares_kernel<T>, blocks_of(task), kStepThreads, sizeof(Squares<T>), stream, task,
           static_cast<double*>(workspace), result);
  });
}

}  // namespace effkern::cuda
