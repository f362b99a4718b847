// Adam over a table of tensors: one block per chunk of kChunk elements.
//
// Bytes: each element's gradient, parameter and states are read once, parameter and states written
// once; a block also reads its chunk row and 6 numbers of the table (7 with amsgrad).
//
// Occupancy: 4 blocks of 256 threads a multiprocessor, so at most 64 registers a thread; one block
// less with amsgrad, one less for float64.
#include "cuda/adam.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "math/adam.h"

namespace effkern::cuda {
namespace {

constexpr int kThreads = 256;
template <class T, bool kAmsgrad>
constexpr int kBlocksPerMultiprocessor = 4 - (sizeof(T) == 8) - kAmsgrad;

// What the threads of a block share: where their chunk lies and the scalars of its tensor.
template <class T>
struct Chunk {
  T *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  const T* grad;
  int count;    // of elements
  int vectors;  // of 16 bytes among them; 0 where an address is not a multiple of 16
  AdamScalars<Acc<T>> scalars;
};

template <class T, bool kAmsgrad>
__device__ void read_chunk(Chunk<T>& chunk, const int64_t* table, const int32_t* chunks,
                           int64_t elapsed, const AdamOptions& options) {
  const int32_t* const chunk_row = chunks + block_index() * kChunkColumns;
  const int64_t* const row = table + load(chunk_row + kChunkTensor) * int64_t{kTableColumns};
  const double t = static_cast<double>(load(row + kSteps) + elapsed);
  chunk.scalars = adam_scalars<Acc<T>>(options, t);

  const int64_t start = load(chunk_row + kChunkIndex) * kChunk;
  const int64_t left = load(row + kNumel) - start;
  chunk.count = static_cast<int>(left < kChunk ? left : kChunk);
  int64_t addresses = 0;
  const auto address = [&](TableColumn column) {
    const int64_t result = load(row + column) + start * static_cast<int64_t>(sizeof(T));
    addresses |= result;
    return reinterpret_cast<T*>(result);
  };
  chunk.param = address(kParam);
  chunk.grad = address(kGrad);
  chunk.exp_avg = address(kState0);
  chunk.exp_avg_sq = address(kState1);
  if constexpr (kAmsgrad) chunk.max_exp_avg_sq = address(kState2);
  chunk.vectors = addresses % 16 == 0 ? chunk.count / kWidth<T> : 0;
}

// V elements from `offset` on.
template <int V, bool kAmsgrad, class T>
__device__ __forceinline__ void update(const Chunk<T>& chunk, int offset) {
  const Pack<T, V> grad = load<V>(chunk.grad + offset);
  Pack<T, V> param = load<V>(chunk.param + offset);
  Pack<T, V> exp_avg = load<V>(chunk.exp_avg + offset);
  Pack<T, V> exp_avg_sq = load<V>(chunk.exp_avg_sq + offset);
  Pack<T, V> max_exp_avg_sq;
  if constexpr (kAmsgrad) max_exp_avg_sq = load<V>(chunk.max_exp_avg_sq + offset);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Acc<T> p = widen(param.value[v]), m = widen(exp_avg.value[v]), s = widen(exp_avg_sq.value[v]);
    Acc<T> largest = 0;
    if constexpr (kAmsgrad) largest = widen(max_exp_avg_sq.value[v]);
    adam_update<kAmsgrad>(p, static_cast<Acc<T>>(widen(grad.value[v])), m, s, largest,
                          chunk.scalars);
    param.value[v] = narrow<T>(p);
    exp_avg.value[v] = narrow<T>(m);
    exp_avg_sq.value[v] = narrow<T>(s);
    if constexpr (kAmsgrad) max_exp_avg_sq.value[v] = narrow<T>(largest);
  }
  store(chunk.param + offset, param);
  store(chunk.exp_avg + offset, exp_avg);
  store(chunk.exp_avg_sq + offset, exp_avg_sq);
  if constexpr (kAmsgrad) store(chunk.max_exp_avg_sq + offset, max_exp_avg_sq);
}

template <class T, bool kAmsgrad>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T, kAmsgrad>)
    adam_kernel(const int64_t* table, const int32_t* chunks, int64_t elapsed, AdamOptions options) {
  // One thread reads the table and takes the logarithms; the others wait for it, while other blocks
  // load.
  Chunk<T>* const shared = shared_memory<Chunk<T>>();
  if (threadIdx.x == 0) read_chunk<T, kAmsgrad>(*shared, table, chunks, elapsed, options);
  __syncthreads();
  const Chunk<T> chunk = *shared;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < chunk.vectors; i += kThreads) {
    update<kWidth<T>, kAmsgrad>(chunk, i * kWidth<T>);
  }
  for (int i = chunk.vectors * kWidth<T> + thread; i < chunk.count; i += kThreads) {
    update<1, kAmsgrad>(chunk, i);
  }
}

}  // namespace

void adam(const AdamLaunch& task, cudaStream_t stream) {
  if (task.chunk_count == 0) return;
  if (task.chunk_count > kMostBlocks) throw std::runtime_error("effkern: too many chunks");
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(task.options.amsgrad ? adam_kernel<T, true> : adam_kernel<T, false>,
           dim3(static_cast<unsigned>(task.chunk_count)), kThreads, sizeof(Chunk<T>), stream,
           task.table, task.chunks, task.elapsed, task.options);
  });
}

}  // namespace effkern::cuda
