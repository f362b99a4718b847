// Kernels with one fault each, and their right form: what test_simt.py runs to see each fault
// found. Usage: broken_kernels FAULT; prints the sum of what the kernel wrote.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace {

using effkern::cuda::load;
using effkern::cuda::store;

constexpr int kThreads = 64;

enum Fault {
  kNone,
  kNoBarrier,      // reads what another thread has perhaps not written yet
  kLeavesEarly,    // one thread skips the barrier
  kSharedOverrun,  // one float past the shared memory
  kGlobalOverrun,  // one float past the input
  kMisaligned,     // 16 bytes from an address that is no multiple of 16
  kUnwritten,      // adds shared memory that nothing wrote
  kHalfWarp,       // a shuffle that half of a warp does not come to
};

// out[i] = in[63 - i], by way of shared memory.
__global__ void reverse(const float* in, float* out, Fault fault) {
  float* const shared = effkern::cuda::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  if (fault == kLeavesEarly && i == 5) return;
  const int from = fault == kGlobalOverrun ? i + 1 : i;
  float value = load(in + from);
  if (fault == kMisaligned && i == 0) value = load<4>(in + 1).value[0];
  shared[fault == kSharedOverrun ? i + 1 : i] = value;
  if (fault != kNoBarrier) __syncthreads();
  float result = shared[kThreads - 1 - i];
  if (fault == kUnwritten) result += shared[kThreads];
  if (fault != kHalfWarp || i < 16) result += __shfl_xor_sync(0xffffffffu, 0.0f, 1);
  store(out + i, result);
}

}  // namespace

int main(int, char** arguments) {
  const Fault fault = static_cast<Fault>(std::atoi(arguments[1]));
  std::vector<float> in(kThreads, 1.0f), out(kThreads);
  const size_t shared = (kThreads + (fault == kUnwritten)) * sizeof(float);
  effkern::cuda::launch(reverse, dim3(1), kThreads, shared, nullptr,
                        static_cast<const float*>(in.data()), out.data(), fault);
  float sum = 0;
  for (const float value : out) sum += value;
  std::printf("%g\n", sum);
}
