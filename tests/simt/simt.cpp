// Runs the threads of a block as fibers on one CPU thread. See simt.h.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

Thread current;
Counts counts;

void fail(const char* what) {
  std::fprintf(stderr, "simt: block (%u, %u), thread %u: %s\n", current.block.x, current.block.y,
               current.index.x, what);
  std::abort();
}

namespace {

// ---- switching stacks ----
// swapcontext makes a system call at each switch, for the signal mask; where the few instructions
// that are needed are written down, they are ten times faster.

#if defined(__x86_64__)
using Position = void*;
extern "C" void simt_switch(Position* from, Position to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

void switch_stack(Position& from, Position& to) { simt_switch(&from, to); }

// As if `entry` had been called from nowhere and had switched away at once.
void prepare(Position& position, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where `entry` would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  position = top;
}
#else
using Position = ucontext_t;

void switch_stack(Position& from, Position& to) { swapcontext(&from, &to); }

void prepare(Position& position, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&position);
  position.uc_stack.ss_sp = stack;
  position.uc_stack.ss_size = bytes;
  position.uc_link = nullptr;
  makecontext(&position, entry, 0);
}
#endif

// AddressSanitizer wants to know of each switch, before it and after.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 << 10;
void leave(void** fake_stack, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
void arrive(void* fake_stack, const void** old_stack, size_t* old_bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, old_stack, old_bytes);
}
#else
constexpr size_t kStackBytes = 128 << 10;
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
#endif

// ---- one block at a time ----

constexpr int kWarp = 32;

// Goes up when everybody has arrived; who waits for it remembers what it was.
struct MeetingPoint {
  unsigned arrived = 0, passed = 0;
};

struct Warp : MeetingPoint {
  // Of two exchanges in a row: nobody can be two ahead of a lane that has not read.
  uint64_t words[2][kWarp];
};

struct Fiber {
  Position position;
  char* stack;
  dim3 index;
  bool finished = true;
  const MeetingPoint* waits_at = nullptr;
  unsigned since = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

std::mutex one_launch_at_a_time;
std::mt19937_64 shuffler(0);
std::set<const void*> kernels;

std::vector<Fiber*> fibers;  // made as needed, kept for ever
std::vector<Warp> warps;
MeetingPoint block;
unsigned block_threads;
Fiber* running;
Position scheduler;
Body body;
void* body_context;
char* shared;

const void* scheduler_stack;
size_t scheduler_stack_bytes;

void to_scheduler() {
  Fiber* const mine = running;
  leave(&mine->fake_stack, scheduler_stack, scheduler_stack_bytes);
  switch_stack(mine->position, scheduler);
  arrive(mine->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void to_fiber(Fiber& fiber) {
  running = &fiber;
  current.index = fiber.index;
  void* fake_stack = nullptr;
  leave(&fake_stack, fiber.stack, kStackBytes);
  switch_stack(scheduler, fiber.position);
  arrive(fake_stack, nullptr, nullptr);
}

// A fiber's life: one thread of one block after the other.
void live() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    body(body_context);
    running->finished = true;
    to_scheduler();
  }
}

Fiber* new_fiber() {
  Fiber* const fiber = new Fiber;
  void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for a thread's stack");
  fiber->stack = static_cast<char*>(stack);
  prepare(fiber->position, fiber->stack, kStackBytes, live);
  return fiber;
}

void meet(MeetingPoint& point, unsigned everybody) {
  if (++point.arrived == everybody) {
    point.arrived = 0;
    ++point.passed;
    return;
  }
  running->waits_at = &point;
  running->since = point.passed;
  to_scheduler();
}

// Lets the threads of a warp run, in a random order, for as long as any of them can.
bool run_warp(unsigned first, unsigned threads, unsigned& left) {
  bool moved_ever = false;
  for (bool moved = true; moved; moved_ever |= moved) {
    moved = false;
    // start + i * step goes through all 32 lanes, whatever the start and the odd step.
    const unsigned random = static_cast<unsigned>(shuffler()), step = random | 1;
    for (unsigned i = 0, start = random >> 8; i < kWarp; ++i) {
      const unsigned lane = (start + i * step) % kWarp;
      if (lane >= threads) continue;
      Fiber& fiber = *fibers[first + lane];
      if (fiber.finished || (fiber.waits_at && fiber.waits_at->passed == fiber.since)) continue;
      fiber.waits_at = nullptr;
      to_fiber(fiber);
      moved = true;
      left -= fiber.finished;
    }
  }
  return moved_ever;
}

// A warp runs ahead of the others as far as it can: what must wait for them, and does not, shows.
void run_block(unsigned threads, std::vector<unsigned>& warp_order) {
  block = MeetingPoint{};
  warps.assign(warp_order.size(), Warp{});
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->index = dim3(i, 0, 0);
    fibers[i]->finished = false;
    fibers[i]->waits_at = nullptr;
  }
  for (unsigned left = threads; left > 0;) {
    bool moved = false;
    std::shuffle(warp_order.begin(), warp_order.end(), shuffler);
    for (const unsigned warp : warp_order) {
      moved |= run_warp(warp * kWarp, std::min<unsigned>(kWarp, threads - warp * kWarp), left);
    }
    if (!moved) fail("threads wait for others that do not come");
  }
}

}  // namespace

void* shared_memory() { return shared; }

void wait_for_block() { meet(block, block_threads); }

int lane() { return static_cast<int>(current.index.x % kWarp); }

uint64_t exchange_in_warp(uint64_t mine, int from) {
  Warp& warp = warps[current.index.x / kWarp];
  uint64_t* const words = warp.words[warp.passed % 2];
  words[lane()] = mine;
  meet(warp, kWarp);
  return words[from];
}

void launch(const void* kernel, dim3 grid, dim3 block_size, size_t shared_bytes, Body call,
            void* context) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1 || block_size.x == 0 ||
      block_size.x > 1024 || shared_bytes > (48 << 10)) {
    fail("a launch that a GPU would refuse");
  }
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  ++counts.launches;
  kernels.insert(kernel);
  block_threads = block_size.x;
  while (fibers.size() < block_threads) fibers.push_back(new_fiber());
  body = call;
  body_context = context;
  shared = static_cast<char*>(std::malloc(shared_bytes));

  std::vector<unsigned> warp_order((block_threads + kWarp - 1) / kWarp);
  std::iota(warp_order.begin(), warp_order.end(), 0u);
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  std::shuffle(blocks.begin(), blocks.end(), shuffler);
  current.block_size = block_size;
  current.grid_size = grid;
  for (const uint64_t index : blocks) {
    current.block =
        dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x), 0);
    std::memset(shared, 0xff, shared_bytes);
    run_block(block_threads, warp_order);
  }
  std::free(shared);
}

}  // namespace simt

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  simt::counts.bytes_uploaded += static_cast<int64_t>(bytes);
  return cudaSuccess;
}

// ---- for Python's ctypes ----

extern "C" {

__attribute__((visibility("default"))) void simt_reset() { simt::counts = {}; }

// Bytes read, bytes written, launches, bytes uploaded since simt_reset.
__attribute__((visibility("default"))) void simt_counts(int64_t* four) {
  std::memcpy(four, &simt::counts, sizeof(simt::counts));
}

__attribute__((visibility("default"))) void simt_seed(uint64_t seed) { simt::shuffler.seed(seed); }

// How many different kernels have been launched since the library was loaded.
__attribute__((visibility("default"))) int64_t simt_kernels() {
  return static_cast<int64_t>(simt::kernels.size());
}
}
