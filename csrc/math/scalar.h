// The functions that the formulas need of a number; the CPU's vectors have theirs in cpu/simd.h.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace effkern {

EFFKERN_INLINE float square_root(float x) { return ::sqrtf(x); }
EFFKERN_INLINE double square_root(double x) { return ::sqrt(x); }

EFFKERN_INLINE float exponential(float x) { return ::expf(x); }
EFFKERN_INLINE double exponential(double x) { return ::exp(x); }

EFFKERN_INLINE float logarithm(float x) { return ::logf(x); }
EFFKERN_INLINE double logarithm(double x) { return ::log(x); }

// The larger of two numbers; a NaN on either side wins, as in torch.maximum.
EFFKERN_INLINE float larger(float a, float b) { return (b > a || b != b) ? b : a; }
EFFKERN_INLINE double larger(double a, double b) { return (b > a || b != b) ? b : a; }

// -1, 0 or 1; 0 for NaN, as torch.sign.
EFFKERN_INLINE float sign_of(float x) { return static_cast<float>((x > 0) - (x < 0)); }
EFFKERN_INLINE double sign_of(double x) { return static_cast<double>((x > 0) - (x < 0)); }

}  // namespace effkern
