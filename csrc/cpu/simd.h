// Vectors of the accumulation type, and how storage types are loaded into and stored from them.
//
// Written with the compiler's vector extensions at the natural width of the instruction set, so
// that one source serves AVX-512, AVX2, SSE2 and NEON; intrinsics stand only where no operator says
// it (square root, half, streaming).
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/macros.h"
#include "math/scalar.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define EFFKERN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define EFFKERN_VECTOR_BYTES 32
#else
#define EFFKERN_VECTOR_BYTES 16
#endif

namespace effkern {

// Storage types that C++ has no arithmetic for.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class Scalar, int kBytes>
struct VectorOf {
  typedef Scalar Type __attribute__((vector_size(kBytes)));
};
using Floats = VectorOf<float, EFFKERN_VECTOR_BYTES>::Type;
using Doubles = VectorOf<double, EFFKERN_VECTOR_BYTES>::Type;
using Ints = VectorOf<int32_t, EFFKERN_VECTOR_BYTES>::Type;
using Words = VectorOf<uint32_t, EFFKERN_VECTOR_BYTES>::Type;
using Halves = VectorOf<uint16_t, EFFKERN_VECTOR_BYTES / 2>::Type;

// What a storage type is computed in.
template <class T>
struct Accumulate {
  using Scalar = float;
  using Vector = Floats;
};
template <>
struct Accumulate<double> {
  using Scalar = double;
  using Vector = Doubles;
};
template <class T>
using Acc = typename Accumulate<T>::Scalar;
template <class T>
using Vec = typename Accumulate<T>::Vector;

template <class T>
constexpr int64_t kLanes = EFFKERN_VECTOR_BYTES / static_cast<int64_t>(sizeof(Acc<T>));

template <class To, class From>
EFFKERN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- 16 bits to 32 and back, where the compiler's own conversions go through one register for
// each element; the upper 16 bits of what is narrowed are zero ----

#if defined(__AVX512F__)
EFFKERN_INLINE Words widened(Halves bits) {
  return bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
}
EFFKERN_INLINE Halves narrowed(Words x) {
  return bit_cast<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(x)));
}
#elif defined(__AVX2__)
EFFKERN_INLINE Words widened(Halves bits) {
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
}
EFFKERN_INLINE Halves narrowed(Words x) {
  const __m256i v = bit_cast<__m256i>(x);
  return bit_cast<Halves>(
      _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
#else
EFFKERN_INLINE Words widened(Halves bits) { return __builtin_convertvector(bits, Words); }
EFFKERN_INLINE Halves narrowed(Words x) { return __builtin_convertvector(x, Halves); }
#endif

// ---- bfloat16 and float16, a vector of bits at a time ----

EFFKERN_INLINE Floats from_bfloat16(Halves bits) { return bit_cast<Floats>(widened(bits) << 16); }

// Rounds to nearest even; a NaN stays a NaN.
EFFKERN_INLINE Halves to_bfloat16(Floats x) {
  const Words bits = bit_cast<Words>(x);
  const Words rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  const Words is_nan = bit_cast<Words>(x != x);
  return narrowed((rounded & ~is_nan) | (is_nan & 0x7fc0u));
}

#if defined(__AVX512F__)
EFFKERN_INLINE Floats from_float16(Halves bits) {
  return bit_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}
EFFKERN_INLINE Halves to_float16(Floats x) {
  return bit_cast<Halves>(
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__) && defined(__F16C__)
EFFKERN_INLINE Floats from_float16(Halves bits) {
  return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
EFFKERN_INLINE Halves to_float16(Floats x) {
  return bit_cast<Halves>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Shifted into float32's place, a float16 is 2^-112 of its value, subnormals included.
EFFKERN_INLINE Floats from_float16(Halves bits) {
  const Words word = widened(bits);
  const Words magnitude = word & 0x7fffu;
  const Words finite = bit_cast<Words>(bit_cast<Floats>(magnitude << 13) * 0x1p112f);
  const Words special = bit_cast<Words>(magnitude >= 0x7c00u);
  const Words value = (finite & ~special) | (special & ((magnitude << 13) | 0x7f800000u));
  return bit_cast<Floats>(value | ((word & 0x8000u) << 16));
}
// Adding a power of two chosen by the exponent makes float32's own rounding drop the right bits.
EFFKERN_INLINE Halves to_float16(Floats x) {
  const Words word = bit_cast<Words>(x);
  const Words twice = word + word;
  const Floats magnitude = bit_cast<Floats>(word & 0x7fffffffu);
  Words bias = twice & 0xff000000u;
  bias = bias < 0x71000000u ? Words{} + 0x71000000u : bias;
  const Floats rounded =
      bit_cast<Floats>((bias >> 1) + 0x07800000u) + (magnitude * 0x1p112f) * 0x1p-110f;
  const Words bits = bit_cast<Words>(rounded);
  const Words value = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
  const Words is_nan = bit_cast<Words>(twice > 0xff000000u);
  return narrowed(((word & 0x80000000u) >> 16) | (value & ~is_nan) | (is_nan & 0x7e00u));
}
#endif

// ---- load and store a whole vector at any address ----

EFFKERN_INLINE Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
EFFKERN_INLINE Doubles load(const double* p) {
  Doubles v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class Half>
EFFKERN_INLINE Halves load_bits(const Half* p) {
  Halves v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
EFFKERN_INLINE Floats load(const BFloat16* p) { return from_bfloat16(load_bits(p)); }
EFFKERN_INLINE Floats load(const Float16* p) { return from_float16(load_bits(p)); }

EFFKERN_INLINE void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof(v)); }
EFFKERN_INLINE void store(double* p, Doubles v) { __builtin_memcpy(p, &v, sizeof(v)); }
EFFKERN_INLINE void store(BFloat16* p, Floats v) {
  const Halves bits = to_bfloat16(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
EFFKERN_INLINE void store(Float16* p, Floats v) {
  const Halves bits = to_float16(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// ---- codes of 8 bits ----

// The compiler's own conversions go through one register for each element. Codes are stored four
// vectors at a time: the lowest 8 bits of each number.
#if defined(__AVX512F__)
EFFKERN_INLINE Ints load_codes(const int8_t* p) {
  return bit_cast<Ints>(
      _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
EFFKERN_INLINE Ints load_codes(const uint8_t* p) {
  return bit_cast<Ints>(
      _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
EFFKERN_INLINE void store_codes(void* p, const Ints (&v)[4]) {
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(static_cast<__m128i*>(p) + i,
                     _mm512_maskz_cvtepi32_epi8(0xffff, bit_cast<__m512i>(v[i])));
  }
}
#elif defined(__AVX2__)
EFFKERN_INLINE Ints load_codes(const int8_t* p) {
  return bit_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
EFFKERN_INLINE Ints load_codes(const uint8_t* p) {
  return bit_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
EFFKERN_INLINE void store_codes(void* p, const Ints (&v)[4]) {
  const auto low = [&](int i) { return bit_cast<__m256i>(v[i] & 0xff); };
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_packus_epi32(low(0), low(1)), _mm256_packus_epi32(low(2), low(3)));
  // Packing leaves each half of a register to itself.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
}
#elif defined(__SSE2__)
EFFKERN_INLINE __m128i load_four_codes(const void* p) {
  int32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return _mm_cvtsi32_si128(bytes);
}
EFFKERN_INLINE Ints load_codes(const int8_t* p) {
  const __m128i bytes = load_four_codes(p), twice = _mm_unpacklo_epi8(bytes, bytes);
  return bit_cast<Ints>(_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24));
}
EFFKERN_INLINE Ints load_codes(const uint8_t* p) {
  const __m128i zero = _mm_setzero_si128();
  return bit_cast<Ints>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(load_four_codes(p), zero), zero));
}
EFFKERN_INLINE void store_codes(void* p, const Ints (&v)[4]) {
  const auto low = [&](int i) { return bit_cast<__m128i>(v[i] & 0xff); };
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi16(_mm_packs_epi32(low(0), low(1)),
                                                              _mm_packs_epi32(low(2), low(3))));
}
#else
template <class Code>
EFFKERN_INLINE Ints load_codes(const Code* p) {
  Ints v = {};
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = p[i];
  return v;
}
EFFKERN_INLINE void store_codes(void* p, const Ints (&v)[4]) {
  for (int64_t i = 0; i < 4 * kLanes<float>; ++i)
    static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(v[i / kLanes<float>][i % kLanes<float>]);
}
#endif

// The value that comes back from storage type T.
template <class T>
EFFKERN_INLINE Vec<T> rounded_to(Vec<T> v) {
  if constexpr (__is_same(T, BFloat16)) {
    return from_bfloat16(to_bfloat16(v));
  } else if constexpr (__is_same(T, Float16)) {
    return from_float16(to_float16(v));
  } else {
    return v;
  }
}

// ---- the last elements of a row or tensor: fewer than a vector ----

// Never inlined: a loop over rows has one such call for each of its operands, and takes few of
// them.

// Elements past `count` read as zero.
template <class T>
EFFKERN_OUTLINE Vec<T> load_first(const T* p, int64_t count) {
  T padded[kLanes<T>] = {};
  __builtin_memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}
template <class T>
EFFKERN_OUTLINE void store_first(T* p, Vec<T> v, int64_t count) {
  T padded[kLanes<T>];
  store(padded, v);
  __builtin_memcpy(p, padded, static_cast<size_t>(count) * sizeof(T));
}

// The rest as zeros.
EFFKERN_INLINE Floats first_lanes(Floats x, int64_t count) {
  for (int64_t lane = count; lane < kLanes<float>; ++lane) x[lane] = 0;
  return x;
}

// Whole vectors and the last, shorter one alike.
template <class T>
EFFKERN_INLINE Vec<T> load_some(const T* p, int64_t count) {
  return count == kLanes<T> ? load(p) : load_first(p, count);
}
template <class T>
EFFKERN_INLINE void store_some(T* p, Vec<T> v, int64_t count) {
  if (count == kLanes<T>) {
    store(p, v);
  } else {
    store_first(p, v, count);
  }
}

// ---- past the caches, for outputs larger than they are: the address must be a multiple of the
// vector ----

template <class T>
EFFKERN_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) >= 4) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) >= 4) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
    return;
  }
#elif defined(__SSE2__)
  if constexpr (sizeof(T) >= 4) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(v));
    return;
  }
#endif
  store(p, v);
}

// Streamed stores are weakly ordered: call this before another thread may read them.
EFFKERN_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- float32 to float64 ----

struct DoublesPair {
  Doubles low, high;  // the first and the second half of the lanes
};
EFFKERN_INLINE DoublesPair widened(Floats x) {
#if defined(__AVX512F__)
  const auto half = [&](auto i) {
    const __m256 lanes = _mm512_maskz_extractf32x8_ps(0xff, bit_cast<__m512>(x), i.value);
    return bit_cast<Doubles>(_mm512_maskz_cvtps_pd(0xff, lanes));
  };
  return {half(std::integral_constant<int, 0>()), half(std::integral_constant<int, 1>())};
#elif defined(__AVX2__)
  const __m256 v = bit_cast<__m256>(x);
  return {bit_cast<Doubles>(_mm256_cvtps_pd(_mm256_castps256_ps128(v))),
          bit_cast<Doubles>(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)))};
#elif defined(__SSE2__)
  const __m128 v = bit_cast<__m128>(x);
  return {bit_cast<Doubles>(_mm_cvtps_pd(v)), bit_cast<Doubles>(_mm_cvtps_pd(_mm_movehl_ps(v, v)))};
#else
  DoublesPair wide = {};
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    wide.low[i] = x[i];
    wide.high[i] = x[i + kLanes<double>];
  }
  return wide;
#endif
}

// ---- arithmetic that no operator says ----

EFFKERN_INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return bit_cast<Floats>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<Floats>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#elif defined(__SSE2__)
  return bit_cast<Floats>(_mm_sqrt_ps(bit_cast<__m128>(x)));
#elif defined(__ARM_NEON)
  return bit_cast<Floats>(vsqrtq_f32(bit_cast<float32x4_t>(x)));
#else
  for (int64_t i = 0; i < kLanes<float>; ++i) x[i] = square_root(static_cast<float>(x[i]));
  return x;
#endif
}
EFFKERN_INLINE Doubles square_root(Doubles x) {
#if defined(__AVX512F__)
  return bit_cast<Doubles>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(x)));
#elif defined(__AVX2__)
  return bit_cast<Doubles>(_mm256_sqrt_pd(bit_cast<__m256d>(x)));
#elif defined(__SSE2__)
  return bit_cast<Doubles>(_mm_sqrt_pd(bit_cast<__m128d>(x)));
#elif defined(__ARM_NEON)
  return bit_cast<Doubles>(vsqrtq_f64(bit_cast<float64x2_t>(x)));
#else
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = square_root(static_cast<double>(x[i]));
  return x;
#endif
}

EFFKERN_INLINE Floats larger(Floats a, Floats b) { return ((b > a) | (b != b)) ? b : a; }
EFFKERN_INLINE Doubles larger(Doubles a, Doubles b) { return ((b > a) | (b != b)) ? b : a; }

EFFKERN_INLINE Floats sign_of(Floats x) {
  return x > 0 ? Floats{} + 1 : (x < 0 ? Floats{} - 1 : Floats{});
}
EFFKERN_INLINE Doubles sign_of(Doubles x) {
  return x > 0 ? Doubles{} + 1 : (x < 0 ? Doubles{} - 1 : Doubles{});
}

// The sum of the lanes, in an order that depends on their number alone.
template <class V>
EFFKERN_INLINE auto sum_lanes(V v) {
  constexpr int kCount = sizeof(v) / sizeof(v[0]);
  auto sum = v[0];
  for (int i = 1; i < kCount; ++i) sum += v[i];
  return sum;
}

template <class V>
EFFKERN_INLINE auto largest_lane(V v) {
  constexpr int kCount = sizeof(v) / sizeof(v[0]);
  auto largest = v[0];
  for (int i = 1; i < kCount; ++i) largest = larger(largest, v[i]);
  return largest;
}

// The first `count` lanes of v, and `rest` in the others.
template <class T>
EFFKERN_OUTLINE Vec<T> with_rest(Vec<T> v, int64_t count, Acc<T> rest) {
  for (int64_t i = count; i < kLanes<T>; ++i) v[i] = rest;
  return v;
}

}  // namespace effkern
