// Words that let one source serve g++, nvcc and the CPU stand-in for CUDA (tests/simt).
#pragma once

#if defined(__CUDACC__) || defined(EFFKERN_SIMT)
#define EFFKERN_HOST_DEVICE __host__ __device__
#else
#define EFFKERN_HOST_DEVICE
#endif

// Internal linkage and always inlined: the CPU kernels are compiled once per instruction set, and a
// function that the linker could share between those copies would bring AVX-512 to a machine
// without it.
#define EFFKERN_INLINE EFFKERN_HOST_DEVICE static inline __attribute__((always_inline))

// Internal linkage and a function of its own.
#define EFFKERN_OUTLINE [[maybe_unused]] static __attribute__((noinline))

// The same for member functions that are not static.
#define EFFKERN_MEMBER EFFKERN_HOST_DEVICE inline __attribute__((always_inline))

// The same for lambdas, behind their parameters.
#define EFFKERN_LAMBDA __attribute__((always_inline))
