// Vectors of the instruction set that this file is compiled for: arithmetic, exp and tanh, and the
// register-tiled product. GCC's and Clang's vector types, and intrinsics for what they cannot say. Everything
// is local to the file that includes it (anonymous namespace, nothing of the standard library), so that code
// built for one instruction set can never be linked into another's.
#pragma once

#include <cstdint>
#ifdef __SSE2__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds some in its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cells.h"

namespace sire_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileVectors = 4;
#define SIRE_X86(operation) _mm512_##operation
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileVectors = 2;
#define SIRE_X86(operation) _mm256_##operation
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileVectors = 4;
#else
constexpr int kVectorBytes = 16, kTileVectors = 2;
#ifdef __SSE2__
#define SIRE_X86(operation) _mm_##operation
#endif
#endif
// kTileRows * kTileVectors accumulators, the vectors of one row of weights and a broadcast fill the registers
constexpr int kTileRows = 6;

// Tiles of so few rows that are taken side by side, since each sum waits for its last addition: they leave
// registers free.
constexpr int abreast(int rows) { return kTileVectors > 2 || rows > 3 ? 1 : rows > 1 ? 2 : 4; }

template <class T>
struct Vector;

template <>
struct Vector<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float largest = 88.f;  // 1 / (1 + exp(x)) is denormal, that is 0, but exp(x) not infinite
  static constexpr float saturated = 9.1f;  // tanh is 1 to rounding
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, from the constant on; exp(r) - 1 is off by eps / 9 at most
  static constexpr float series[] = {4.9999998e-1f, 1.6666544e-1f, 4.16672e-2f, 8.36652e-3f, 1.38825e-3f};
};

template <>
struct Vector<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double largest = 709.;
  static constexpr double saturated = 19.1;
  static constexpr double series[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                      1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                      1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

// What cells.h computes with.
template <class T>
struct Math : Vector<T> {
  using typename Vector<T>::V;
  using typename Vector<T>::I;
  static constexpr int width = kVectorBytes / sizeof(T);

  static SIRE_FN V splat(T x) { return x - V{}; }

  static SIRE_FN V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }

  static SIRE_FN void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

  // the first n values of a vector
  static SIRE_FN V load(const T* p, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      return _mm512_maskz_loadu_ps((1u << n) - 1, p);
    else
      return _mm512_maskz_loadu_pd((1u << n) - 1, p);
#elif defined(__AVX2__)
    I number;
    for (int l = 0; l < width; ++l) number[l] = l;
    if constexpr (sizeof(T) == 4)
      return _mm256_maskload_ps(p, (__m256i)(number < n));
    else
      return _mm256_maskload_pd(p, (__m256i)(number < n));
#else
    V v{};
    for (int l = 0; l < n; ++l) v[l] = p[l];
    return v;
#endif
  }

  static SIRE_FN void store(T* p, V v, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
    else
      _mm512_mask_storeu_pd(p, (1u << n) - 1, v);
#else
    for (int l = 0; l < n; ++l) p[l] = v[l];
#endif
  }

  // x = power * ln 2 + r, |r| <= ln(2) / 2: returns 2^power and, in less, exp(r) - 1
  static SIRE_FN V split_exp(V x, V& less) {
    const V shifted = x * T(1.4426950408889634) + Vector<T>::round;
    const V power = shifted - Vector<T>::round;
    const V r = (x - power * Vector<T>::ln2_high) - power * Vector<T>::ln2_low;
    constexpr int terms = sizeof Vector<T>::series / sizeof(T);
    V series = splat(Vector<T>::series[terms - 1]);
#pragma GCC unroll 16
    for (int n = terms - 2; n >= 0; --n) series = series * r + Vector<T>::series[n];
    less = r * r * series + r;
    // the whole number sits in the low bits of `shifted`: moved up, and the bias added, it is the exponent
    const I bits = ((I)shifted << Vector<T>::mantissa) + ((I)splat(T(1)));
    return (V)bits;
  }

  // a NaN passes through: of these instructions' operands the second is the result if one is no number
  static SIRE_FN V clamp(V x, T limit) {
    const V high = splat(limit), low = -high;
#ifdef SIRE_X86
    if constexpr (sizeof(T) == 4)
      return SIRE_X86(min_ps)(high, SIRE_X86(max_ps)(low, x));
    else
      return SIRE_X86(min_pd)(high, SIRE_X86(max_pd)(low, x));
#else
    x = x < low ? low : x;
    return x > high ? high : x;
#endif
  }

  static SIRE_FN V sigmoid(V x) {
    V less;
    const V scale = split_exp(clamp(-x, Vector<T>::largest), less);
    return 1 / (1 + (scale * less + scale));
  }

  // (e - 1) / (e + 1) with e = exp(2 x), from e - 1 and not from e: exact to rounding near 0 too
  static SIRE_FN V tanh(V x) {
    V less;
    const V scale = split_exp(2 * clamp(x, Vector<T>::saturated), less);
    const V e_minus_1 = scale * less + (scale - 1);
    return e_minus_1 / (e_minus_1 + 2);
  }

  // tanh(c) once more, of which h = o tanh(c) is at hand
  static SIRE_FN V tanh_again(V, V h, V o) { return o == 0 ? h : h / o; }

  static SIRE_FN V relu(V x) { return x < 0 ? V{} : x; }
  static SIRE_FN V positive(V condition, V value) { return condition <= 0 ? V{} : value; }

  static SIRE_FN T sum(V v) {
    T total = 0;
    for (int l = 0; l < width; ++l) total += v[l];
    return total;
  }
};

// Vectors that n values take.
template <class T>
int64_t vectors(int64_t n) {
  return (n + Math<T>::width - 1) / Math<T>::width;
}

// What a product is made of: sums of T over words, each of which holds one factor, or with kBfloat16 two
// neighbouring ones along the sum.
template <class T, bool kBfloat16 = false>
struct Product {
  using Word = T;
  using V = typename Math<T>::V;
  using Words = V;
  static constexpr bool converts = false;

  static int64_t words(int64_t n) { return n; }
  static SIRE_FN Words splat(Word x) { return Math<T>::splat(x); }
  static SIRE_FN V multiply_add(V sum, Words a, Words b) { return sum + a * b; }
  static SIRE_FN Word word(const T* from, int64_t k_step, int64_t k, int64_t) { return from[k * k_step]; }
  // n values of a row, and n rows of `stride` values each, as words
  static const Word* row(int64_t, const T* from, Word*) { return from; }
  static const Word* rows(int64_t, int64_t, const T* from, Word*) { return from; }
};

#ifdef __AVX512BF16__
template <>
struct Product<float, true> {
  using Word = uint32_t;
  using V = Math<float>::V;
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  static constexpr bool converts = true;

  static int64_t words(int64_t n) { return (n + 1) / 2; }
  static SIRE_FN Words splat(Word x) { return x - Words{}; }
  static SIRE_FN V multiply_add(V sum, Words a, Words b) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static SIRE_FN uint32_t bits(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, sizeof u);
    return u >> 16;  // exact: the weights that are packed came as bfloat16
  }

  static SIRE_FN Word word(const float* from, int64_t k_step, int64_t k, int64_t K) {
    const uint32_t first = bits(from[2 * k * k_step]);
    return 2 * k + 1 < K ? first | bits(from[(2 * k + 1) * k_step]) << 16 : first;
  }

  static const Word* row(int64_t n, const float* from, Word* to) {
    for (int64_t k = 0; k < n; k += 32) {
      const auto half = [&](int64_t first) {
        const int64_t rest = n - first;
        return (__m512)(rest >= 16 ? Math<float>::load(from + first)
                                   : Math<float>::load(from + first, rest > 0 ? int(rest) : 0));
      };
      const __m512bh both = _mm512_cvtne2ps_pbh(half(k + 16), half(k));
      __builtin_memcpy(to + k / 2, &both, sizeof both);
    }
    return to;
  }

  static const Word* rows(int64_t n, int64_t stride, const float* from, Word* to) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const auto rounded = [&](int64_t at) {
      return __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)Math<float>::load(from + at)), Words);
    };
    for (int64_t k = 0; k < n; k += 2)
      for (int64_t c = 0; c < stride; c += 16) {
        Words both = rounded(k * stride + c);
        if (k + 1 < n) both |= rounded((k + 1) * stride + c) << 16;
        __builtin_memcpy(to + k / 2 * stride + c, &both, sizeof both);
      }
    return to;
  }
};
#endif

// The right-hand matrix of a product, as rows of vectors: `vector_step` from one vector of a row to the next,
// `row_step` from one row to the next (0: packed by pack(), tile by tile).
template <class Word>
struct Columns {
  const Word* p;
  int64_t vector_step, row_step;
};

// out[r][:] = init[r][:] + sum_k a[r][k * a_step] * w[k][:] for R rows and N vectors of columns, in W parts
// that lie tile_step apart in w, k counting words. What is there already is added last: added to first, it
// would round every term to its own size. Meanwhile the same columns of the rows `soon`, if any, are fetched
// into the cache.
template <class T, class P, int R, int N, int W = 1>
void tile(int64_t K, const typename P::Word* const* a, int64_t a_step, const typename P::Word* w,
          int64_t row_step, int64_t tile_step, const T* const* init, T* const* out, const T* const* soon,
          int64_t column) {
  using M = Math<T>;
  constexpr int kPart = N / W;
  typename M::V sum[R][N];
  const typename P::Word* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    rows[r] = a[r];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = typename M::V{};
  }
  if (soon)
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) __builtin_prefetch(soon[r] + column + n * M::width);
  for (int64_t k = 0, at = 0; k < K; ++k, at += a_step, w += row_step) {
    typename P::Words column_vectors[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      __builtin_memcpy(&column_vectors[n], w + n / kPart * tile_step + n % kPart * M::width, kVectorBytes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename P::Words x = P::splat(rows[r][at]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = P::multiply_add(sum[r][n], x, column_vectors[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const int64_t at = column + n * M::width;
      M::store(out[r] + at, M::load(init[r] + at) + sum[r][n]);
    }
}

// The tile of at most R rows and N vectors that fits.
template <class T, class P, int R = kTileRows, int N = kTileVectors, class... Arguments>
void any_tile(int rows, int vectors, Arguments... arguments) {
  if constexpr (R > 1)
    if (rows < R) return any_tile<T, P, R - 1, N>(rows, vectors, arguments...);
  if constexpr (N > 1)
    if (vectors < N) return any_tile<T, P, R, N - 1>(rows, vectors, arguments...);
  tile<T, P, R, N>(arguments...);
}

// Up to kTileRows rows of a product.
template <class T, class P>
struct Panel {
  using Word = typename P::Word;
  int n = 0;
  const Word* a[kTileRows] = {};
  const T* init[kTileRows] = {};
  T* out[kTileRows] = {};
  const T* soon[kTileRows] = {};  // of all rows or of none

  void add(const Word* row, const T* from, T* to, const T* fetch = nullptr) {
    a[n] = row;
    init[n] = from;
    out[n] = to;
    soon[n++] = fetch;
  }

  // their tiles, for all `vectors` of the columns
  void multiply(int64_t vectors, int64_t K, int64_t a_step, const Columns<Word>& w) const {
    constexpr int width = Math<T>::width;
    int64_t v = n == 1   ? side_by_side<1>(vectors, K, a_step, w)
                : n == 2 ? side_by_side<2>(vectors, K, a_step, w)
                : n == 3 ? side_by_side<3>(vectors, K, a_step, w)
                         : 0;
    for (; v < vectors; v += kTileVectors) {
      const int count = vectors - v < kTileVectors ? int(vectors - v) : kTileVectors;
      const int64_t row_step = w.row_step ? w.row_step : count * width;
      any_tile<T, P>(n, count, K, a, a_step, w.p + v * w.vector_step, row_step, int64_t(0), init, out,
                     soon[0] ? soon : nullptr, v * width);
    }
  }

  // tiles of R rows as far as there are enough of them; returns the vectors that this makes
  template <int R>
  int64_t side_by_side(int64_t vectors, int64_t K, int64_t a_step, const Columns<Word>& w) const {
    constexpr int W = abreast(R), N = W * kTileVectors;
    if (W == 1) return 0;
    const int64_t row_step = w.row_step ? w.row_step : kTileVectors * Math<T>::width;
    int64_t v = 0;
    for (; v + N <= vectors; v += N)
      tile<T, P, R, N, W>(K, a, a_step, w.p + v * w.vector_step, row_step, kTileVectors * w.vector_step, init,
                          out, soon[0] ? soon : nullptr, v * Math<T>::width);
    return v;
  }
};

// Calls body(first, count) for panels of at most kTileRows out of n rows, as equal as they can be: a panel of
// one row costs almost as much as one of six.
template <class F>
void each_panel(int64_t n, F body) {
  const int64_t panels = (n + kTileRows - 1) / kTileRows;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = n * p / panels;
    body(first, int(n * (p + 1) / panels - first));
  }
}

// Words of a packed K x N matrix.
template <class T, class P>
int64_t packed_words(int64_t K, int64_t N) {
  return P::words(K) * vectors<T>(N) * Math<T>::width;
}

// Reorders a K x N matrix, element (k, n) at from[k * k_step + n * n_step], into the tiles that Panel
// reads: every `parts`-th of them, from number `part` on.
template <class T, class P>
void pack(int part, int parts, const T* from, int64_t k_step, int64_t n_step, int64_t K, int64_t N,
          typename P::Word* to) {
  constexpr int64_t width = Math<T>::width, tile_columns = kTileVectors * width;
  const int64_t padded = vectors<T>(N) * width;
  for (int64_t first = part * tile_columns; first < padded; first += parts * tile_columns) {
    const int64_t columns = padded - first < tile_columns ? padded - first : tile_columns;
    typename P::Word* tile = to + first * P::words(K);
    // eight words of every column at a time: of a matrix that is stored by columns, a whole cache line each
    for (int64_t begin = 0; begin < P::words(K); begin += 8)
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t k = begin; k < begin + 8 && k < P::words(K); ++k)
          tile[k * columns + c] =
              first + c < N ? P::word(from + (first + c) * n_step, k_step, k, K) : typename P::Word(0);
  }
}

// `columns` that read a K-row matrix packed by pack().
template <class T, class P>
Columns<typename P::Word> packed_columns(const typename P::Word* packed, int64_t K) {
  return {packed, P::words(K) * Math<T>::width, 0};
}

}  // namespace
}  // namespace sire_fast
