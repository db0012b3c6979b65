// Matrix products on one core: rows of A times panels of 32 columns of B, one struct for each kind of instruction.
//
// A kind of product says how its operands are held:
//   T           what A and B hold
//   put         32 values of a row of A, from two vectors of float
//   pack        B from a weight matrix [columns, K] of float
//   multiply    every panel of B with every row of A; each finished piece of at most 32 x 32 goes to `done` in float
// K is padded with zeros to a multiple of 32 (`groups` of 32), the number of columns to whole panels.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace riformer {

constexpr int PANEL = 32;  // columns of B that are computed at once, and channels are padded to

typedef float Vec __attribute__((vector_size(64)));  // 16 floats; where registers are shorter, several of them
typedef float LooseVec __attribute__((vector_size(64), aligned(4), may_alias));
inline Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }
#ifdef __AVX512F__
inline Vec joined(const float* low, const float* high) {  // eight floats from each
  return (Vec)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
}
inline Vec clamped(Vec x, float most) {
  constexpr int SMALLER_MAGNITUDE = 2, SIGN_OF_FIRST = 0;
  return (Vec)_mm512_range_ps((__m512)x, _mm512_set1_ps(most), SMALLER_MAGNITUDE | SIGN_OF_FIRST << 2);
}
#else
inline Vec joined(const float* low, const float* high) {
  Vec value;
  std::memcpy(&value, low, sizeof value / 2);
  std::memcpy(reinterpret_cast<char*>(&value) + sizeof value / 2, high, sizeof value / 2);
  return value;
}
inline Vec clamped(Vec x, float most) {
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof x);
  for (__m256& half : halves) half = _mm256_min_ps(_mm256_max_ps(half, _mm256_set1_ps(-most)), _mm256_set1_ps(most));
  std::memcpy(&x, halves, sizeof x);
  return x;
}
#endif

constexpr long round_up(long value, long step) { return (value + step - 1) / step * step; }

// x * Phi(x) = x * (1/2 + u * P(2 u^2 / c^2 - 1)) with u = x clamped to [-c, c]; P from tools/fit_gelu.py.
template <int N>
inline Vec gelu(Vec x, float clamp, const float (&p)[N]) {
  Vec u = clamped(x, clamp);
  Vec t = u * u * (2 / (clamp * clamp)) - 1;
  Vec sum = Vec{} + p[N - 1];
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; i--) sum = sum * t + p[i];
  return x * (u * sum + 0.5f);
}
inline Vec gelu_close(Vec x) {  // within 1e-6 of exact
  constexpr float p[] = {1.333925585e-01f, -6.651812378e-02f, 4.926426421e-02f, -3.960227410e-02f, 3.208403496e-02f,
                         -2.516807840e-02f, 1.885416159e-02f, -1.372038913e-02f, 9.182265487e-03f, -4.797382669e-03f,
                         2.364897885e-03f, -2.076783510e-03f, 1.497189600e-03f, -4.167179835e-04f};
  return gelu(x, 5.3f, p);
}
inline Vec gelu_fast(Vec x) {  // within 1e-4
  constexpr float p[] = {1.678545592e-01f, -8.157147676e-02f, 5.594869344e-02f, -3.792616306e-02f, 2.377779943e-02f,
                         -1.646726949e-02f, 1.117568079e-02f, -3.744204546e-03f};
  return gelu(x, 4.2f, p);
}

template <class T>
T* allocate(size_t count) {  // zeros; whole cache lines
  size_t bytes = round_up(std::max<size_t>(count, 1) * sizeof(T), 64);
  void* memory = std::aligned_alloc(64, bytes);
  if (!memory) throw std::bad_alloc();
  std::memset(memory, 0, bytes);
  return static_cast<T*>(memory);
}

// A product of vectors: broadcast an element of A (a float, or a pair of bf16), times vectors of B. `Step` says how.
// A lies row by row, B as [panel][K][32].
template <class Step>
struct VectorProduct {
  typedef typename Step::T T;
  typedef typename Step::Register Register;
  static constexpr int PAIR = sizeof(float) / sizeof(T);  // elements of A broadcast together
  static constexpr int LANES = sizeof(Register) / sizeof(float);
  static constexpr int ROWS = Step::ROWS, ROW_UNIT = 1;

  static long row_size(int groups) { return 32 * (groups + 1); }  // a group more than needed, so that rows do not share a cache set
  static T* row(T* a, long r, int groups) { return a + r * row_size(groups); }
  static constexpr int GROUP = 32;
  static void put(T* to, Vec low, Vec high) { Step::put(to, low, high); }
  static Vec gelu(Vec x) { return Step::gelu(x); }
  static void begin() {}
  static void end() {}

  static T* pack(const float* weight, int columns, int k_size) {
    int groups = round_up(k_size, 32) / 32;
    T* packed = allocate<T>(round_up(columns, PANEL) * groups * 32);
    for (int n = 0; n < columns; n++)
      for (int k = 0; k < k_size; k++)
        packed[((long(n / PANEL) * groups * 32 + k / PAIR * PAIR) * PANEL) + n % PANEL * PAIR + k % PAIR] =
            Step::convert(weight[long(n) * k_size + k]);
    return packed;
  }

  template <int M>
  static void piece(const float* a, long row_size, const float* b, int steps, float* out) {
    for (int half = 0; half < PANEL; half += 2 * LANES) {
      Register sums[M][2];
      for (int i = 0; i < M; i++) sums[i][0] = sums[i][1] = Step::zero();
      const float* rows[(M + 2) / 3];  // every third row, so that the other two are within reach of an address
      for (int i = 0; i < M; i += 3) rows[i / 3] = a + i * row_size;
      const float* column = b + half;
      for (int k = 0; k < steps; k++, column += PANEL) {
        Register b0 = Step::load(column), b1 = Step::load(column + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
          Register value = Step::broadcast(rows[i / 3] + k + (i % 3) * row_size);
          sums[i][0] = Step::add(sums[i][0], value, b0);
          sums[i][1] = Step::add(sums[i][1], value, b1);
        }
      }
      for (int i = 0; i < M; i++) {
        Step::store(out + i * PANEL + half, sums[i][0]);
        Step::store(out + i * PANEL + half + LANES, sums[i][1]);
      }
    }
  }

  typedef void (*Piece)(const float*, long, const float*, int, float*);
  template <size_t... M>
  static Piece piece_of(int rows, std::index_sequence<M...>) {
    static constexpr Piece table[] = {&piece<int(M) + 1>...};
    return table[rows - 1];
  }

  template <class Done>
  static void multiply(const T* a, int rows, const T* b, int first_panel, int last_panel, int groups, Done done) {
    alignas(64) float out[ROWS * PANEL];
    const long size = row_size(groups) / PAIR;
    const int steps = groups * 32 / PAIR, pieces = (rows + ROWS - 1) / ROWS;
    for (int n = first_panel; n < last_panel; n++)
      for (int i = 0, from = 0; i < pieces; i++) {
        int to = long(rows) * (i + 1) / pieces;  // pieces of even size
        const float* start = reinterpret_cast<const float*>(a) + from * size;
        const float* panel = reinterpret_cast<const float*>(b) + long(n) * steps * PANEL;
        piece_of(to - from, std::make_index_sequence<ROWS>())(start, size, panel, steps, out);
        done(from, to, n, out);
        from = to;
      }
  }
};

struct Fp32Step {
  typedef float T;
#ifdef __AVX512F__
  typedef __m512 Register;
  static constexpr int ROWS = 12;
  static Register zero() { return _mm512_setzero_ps(); }
  static Register load(const float* p) { return _mm512_loadu_ps(p); }
  static Register broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Register add(Register sum, Register a, Register b) { return _mm512_fmadd_ps(a, b, sum); }
  static void store(float* p, Register value) { _mm512_storeu_ps(p, value); }
#else
  typedef __m256 Register;
  static constexpr int ROWS = 6;
  static Register zero() { return _mm256_setzero_ps(); }
  static Register load(const float* p) { return _mm256_loadu_ps(p); }
  static Register broadcast(const float* p) { return _mm256_set1_ps(*p); }
  static Register add(Register sum, Register a, Register b) { return _mm256_fmadd_ps(a, b, sum); }
  static void store(float* p, Register value) { _mm256_storeu_ps(p, value); }
#endif
  static float convert(float value) { return value; }
  static void put(float* to, Vec low, Vec high) {
    riformer::store(to, low);
    riformer::store(to + 16, high);
  }
  static Vec gelu(Vec x) { return gelu_close(x); }
};
typedef VectorProduct<Fp32Step> Fp32;

#ifdef __AVX512BF16__
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float from_bf16(uint16_t value) {
  uint32_t bits = uint32_t(value) << 16;
  float widened;
  std::memcpy(&widened, &bits, 4);
  return widened;
}
inline __m512i to_bf16(Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

struct Bf16Step {
  typedef uint16_t T;
  typedef __m512 Register;
  static constexpr int ROWS = 12;
  static Register zero() { return _mm512_setzero_ps(); }
  static Register load(const float* p) { return _mm512_loadu_ps(p); }
  static Register broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Register add(Register sum, Register a, Register b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static void store(float* p, Register value) { _mm512_storeu_ps(p, value); }
  static uint16_t convert(float value) { return to_bf16(value); }
  static void put(uint16_t* to, Vec low, Vec high) { _mm512_storeu_si512(to, to_bf16(low, high)); }
  static Vec gelu(Vec x) { return gelu_fast(x); }
};
typedef VectorProduct<Bf16Step> Bf16;
#endif

#ifdef RIFORMER_AMX
// Products of tiles: 2 x 2 tiles of 16 x 16 sums stay in registers. A lies in tiles of 16 rows x 32, B in tiles of
// 16 pairs x 16 columns. With SPLIT a value is the sum of two bf16, and its tile is followed by that of the remainders:
// three products (remainder x remainder is left out) give nearly float32's accuracy.
template <bool SPLIT>
struct Amx {
  typedef uint16_t T;
  static constexpr int TILE = 16 * 32, GROUP = TILE << SPLIT, ROWS = 32, ROW_UNIT = 16;

  static long row_size(int groups) { return long(groups) * 32 << SPLIT; }
  static T* row(T* a, long r, int groups) { return a + r / 16 * groups * GROUP + r % 16 * 32; }
  static Vec widen(__m256i half) {
    return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void put(T* to, Vec low, Vec high) {
    __m512i rounded = to_bf16(low, high);
    _mm512_store_si512(to, rounded);
    if (SPLIT) {
      low -= widen(_mm512_castsi512_si256(rounded));
      high -= widen(_mm512_extracti64x4_epi64(rounded, 1));
      _mm512_store_si512(to + TILE, to_bf16(low, high));
    }
  }
  static Vec gelu(Vec x) { return SPLIT ? gelu_close(x) : gelu_fast(x); }

  static void begin() {
    // Constant, as GCC's intrinsic is declared to read eight bytes, and what a function writes beyond may be dropped.
    static constexpr struct __attribute__((packed)) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config = {};
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  static T* pack(const float* weight, int columns, int k_size) {
    int groups = round_up(k_size, 32) / 32;
    T* packed = allocate<T>(round_up(columns, PANEL) / 16 * groups * GROUP);
    for (int n = 0; n < columns; n++)
      for (int k = 0; k < k_size; k++) {
        float value = weight[long(n) * k_size + k];
        T* to = packed + (long(n / 16) * groups + k / 32) * GROUP + k % 32 / 2 * 32 + n % 16 * 2 + k % 2;
        *to = to_bf16(value);
        if (SPLIT) to[TILE] = to_bf16(value - from_bf16(*to));
      }
    return packed;
  }

  template <class Done>
  static void multiply(const T* a, int rows, const T* b, int first_panel, int last_panel, int groups, Done done) {
    alignas(64) float out[32 * PANEL];
    const long size = long(groups) * GROUP;  // of 16 rows of A, or 16 columns of B
    asm volatile("" : : : "memory");  // nor does the intrinsic that loads a tile say what it reads
    for (int n = first_panel; n < last_panel; n++)
      for (int m = 0; m < rows; m += 32) {
        const T *a0 = a + m / 16 * size, *a1 = a0 + size, *b0 = b + 2 * n * size, *b1 = b0 + size;
        _tile_zero(0);
        _tile_zero(1);
        if (m + 16 < rows) {
          _tile_zero(2);
          _tile_zero(3);
          for (int k = 0; k < groups; k++, a0 += GROUP, a1 += GROUP, b0 += GROUP, b1 += GROUP) {
            _tile_loadd(6, b0, 64);
            _tile_loadd(4, a0, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b1, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a1, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            if (SPLIT) {
              _tile_loadd(4, a0 + TILE, 64);
              _tile_dpbf16ps(0, 4, 6);
              _tile_dpbf16ps(1, 4, 7);
              _tile_loadd(5, a1 + TILE, 64);
              _tile_dpbf16ps(2, 5, 6);
              _tile_dpbf16ps(3, 5, 7);
              _tile_loadd(4, a0, 64);
              _tile_loadd(6, b0 + TILE, 64);
              _tile_dpbf16ps(0, 4, 6);
              _tile_loadd(7, b1 + TILE, 64);
              _tile_dpbf16ps(1, 4, 7);
              _tile_loadd(5, a1, 64);
              _tile_dpbf16ps(2, 5, 6);
              _tile_dpbf16ps(3, 5, 7);
            }
          }
          _tile_stored(2, out + 16 * PANEL, 4 * PANEL);
          _tile_stored(3, out + 16 * PANEL + 16, 4 * PANEL);
        } else {
          for (int k = 0; k < groups; k++, a0 += GROUP, b0 += GROUP, b1 += GROUP) {
            _tile_loadd(4, a0, 64);
            _tile_loadd(6, b0, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b1, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (SPLIT) {
              _tile_loadd(5, a0 + TILE, 64);
              _tile_dpbf16ps(0, 5, 6);
              _tile_dpbf16ps(1, 5, 7);
              _tile_loadd(6, b0 + TILE, 64);
              _tile_dpbf16ps(0, 4, 6);
              _tile_loadd(7, b1 + TILE, 64);
              _tile_dpbf16ps(1, 4, 7);
            }
          }
        }
        _tile_stored(0, out, 4 * PANEL);
        _tile_stored(1, out + 16, 4 * PANEL);
        done(m, std::min(m + 32, rows), n, out);
      }
  }
};
#endif

}  // namespace riformer
