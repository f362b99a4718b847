// Which copy of the kernels runs: decided once, at load, by the machine or by EFFKERN_ISA.
#include "cpu/choose_isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"

namespace effkern::cpu {
namespace {

struct Candidate {
  const char* name;
  Kernels (*kernels)();
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
bool always() { return true; }

// Widest first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {"avx512", avx512::kernels, has_avx512},
    {"avx2", avx2::kernels, has_avx2},
#endif
    {"baseline", baseline::kernels, always},
};

const Candidate* find(const char* name) {
  for (const Candidate& candidate : kCandidates) {
    if ((!name || !std::strcmp(candidate.name, name)) && candidate.runs_here()) return &candidate;
  }
  return nullptr;
}

Kernels choose_at_load() {
  const char* const wanted = std::getenv("EFFKERN_ISA");
  if (wanted && *wanted) {
    if (const Candidate* found = find(wanted)) return found->kernels();
    std::fprintf(
        stderr,
        "effkern: EFFKERN_ISA=%s is not an instruction set of this machine and build; ignored\n",
        wanted);
  }
  return find(nullptr)->kernels();
}

Kernels& current() {
  static Kernels kernels = choose_at_load();
  return kernels;
}

}  // namespace

const Kernels& chosen_kernels() { return current(); }

const char* isa() { return current().isa; }

bool set_isa(const char* name) {
  const Candidate* const found = find(name);
  if (found) current() = found->kernels();
  return found != nullptr;
}

}  // namespace effkern::cpu
