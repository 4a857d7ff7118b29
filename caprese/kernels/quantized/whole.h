/* Products in whole numbers, where inputs are bfloat16, weights codes, and the processor multiplies pairs of 16 bits. */
#pragma once
#include "codes.h"

/* Inputs x [B, C] as a product reads them: floats, and where `whole` is there, whole numbers of `unit` each, 127 * 128 to
   the largest; products are then exact. That rounds about as bfloat16 does where the largest is not FAR from the others,
   and is not done where it is. (For floats it takes more bits, and is no faster than floats are.) */
typedef struct {
  const float *x;
  const int16_t *whole; /* [B, step], a line of the cache begins with each; for 4 bits in the order of `nibbles`; or NULL */
  const float *units;   /* [B] */
  const int32_t *zeros; /* 4 bits, [B, step / 8]: what a lane of codes that lack their zero has too much, negated */
  int bits;
  long step, columns;
} inputs;

#ifdef __AVX512VNNI__
#define WIDE 128     /* columns of 4 bits in a vector */
#define MOST 16384   /* columns up to which 32 bits hold a product with 8 */
#define LARGEST (127 * 128)
#define FAR 128      /* times the mean size of the others: these then have some seven bits left */
#define ROWS_8 4     /* rows whose products are taken side by side */
#define ROWS_4 2

/* words from one input to the next: whole vectors, and some more, for what lies a power of two apart shares a place in the
   cache */
static long words(long C) { return (C + WIDE - 1) / WIDE * WIDE + WIDE; }

/* floats of memory that `prepare` needs */
static long inputs_room(long C, long B) { return B * (words(C) * 5 / 8 + 1) + LINE / 4; }

inline __mmask16 lanes_of(long left) { return left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0; }

/* sixteen words: those at even places, then those at odd ones */
inline __m128i evens(__m256i words) { return _mm256_cvtepi32_epi16(words); }
inline __m128i odds(__m256i words) { return _mm256_cvtepi32_epi16(_mm256_srli_epi32(words, 16)); }

static inputs prepare(int bits, int type, const float *x, long C, long B, float *room) {
  inputs in = {.x = x, .bits = bits, .columns = C};
  if (bits > 8 || type == 32 || (bits == 8 && C > MOST)) return in;
  in.step = words(C);
  int16_t *whole = (int16_t *)(((uintptr_t)room + LINE - 1) / LINE * LINE);
  int32_t *zeros = (int32_t *)(whole + B * in.step);
  float *units = (float *)zeros + B * in.step / 8;
  in.whole = whole, in.zeros = zeros, in.units = units;
  for (long b = 0; b < B; b++, x += C, whole += in.step) {
    __m512 most = _mm512_setzero_ps(), all = most;
    int odd = 0; /* whether there is what is no finite number */
    for (long c = 0; c < C; c += LANES) {
      __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes_of(C - c), x + c));
      odd |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
      most = _mm512_max_ps(most, size), all = _mm512_add_ps(all, size);
    }
    float largest = odd ? 0 : _mm512_reduce_max_ps(most);
    if (largest * C > FAR * (_mm512_reduce_add_ps(all) - largest)) {
      in.whole = NULL;
      return in;
    }
    units[b] = odd ? NAN : largest / LARGEST;
    __m512 by = _mm512_set1_ps(largest > 1e-30f ? LARGEST / largest : 0);
    for (long c = 0; c < in.step; c += LANES) {
      __m512 values = _mm512_maskz_loadu_ps(odd ? 0 : lanes_of(C - c), x + c);
      __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(values, by)));
      if (bits == 8) {
        _mm256_store_si256((__m256i *)(whole + c), words);
        continue;
      }
      int16_t *to = whole + c / WIDE * WIDE + c % WIDE / GROUP * 8 + c % GROUP / LANES * 32;
      _mm_store_si128((__m128i *)to, evens(words));
      _mm_store_si128((__m128i *)(to + 64), odds(words));
    }
    if (bits == 4)
      for (long c = 0; c < in.step; c += WIDE, zeros += LANES) {
        __m512i zero = _mm512_setzero_si512();
        for (int i = 0; i < 4; i++)
          zero = _mm512_dpwssd_epi32(zero, _mm512_load_si512(whole + c + 32 * i), _mm512_set1_epi16(-8));
        _mm512_store_si512(zeros, zero);
      }
  }
  return in;
}

/* _mm512_dpwssd_epi32, in place: GCC moves the sums of a loop to other registers and back */
inline void pairs_added(__m512i *to, __m512i one, __m512i other) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(*to) : "v"(one), "v"(other));
}

/* Codes of 4 bits, without their zero, as words: of each pair of bytes the low half of the first, its high half, and the
   same of the second. */
inline void nibbles(__m512i bytes, __m512i *words) {
  const __m512i half = _mm512_set1_epi16(15);
  words[0] = _mm512_and_si512(bytes, half);
  words[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), half);
  words[2] = _mm512_and_si512(_mm512_srli_epi16(bytes, 8), half);
  words[3] = _mm512_srli_epi16(bytes, 12);
}

/* the sum of each of four: in less than twice the time of one */
inline __m128 four_sums(const __m512 *x) {
  __m512 one = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  __m512 other = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  __m512d low = _mm512_unpacklo_pd((__m512d)one, (__m512d)other), high = _mm512_unpackhi_pd((__m512d)one, (__m512d)other);
  __m512 all = _mm512_add_ps((__m512)low, (__m512)high);
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* `dots` of `many` rows; unrolled early, so that sums are in registers */
inline void whole_dots_8(const weight *w, long place, int many, const inputs *in, long first, int n, float *out,
                         long step) {
  long C = w->columns, apart = in->step, c = 0;
  const char *row[TILE];
  const int16_t *x = in->whole + first * apart;
  __m512i total[TILE][TILE], more[TILE][TILE]; /* two of each where one alone would wait for itself */
  int two = many * n < TILE;
#pragma GCC unroll 4
  for (int r = 0; r < many; r++) row[r] = row_at(w, place + r);
#pragma GCC unroll 4
  for (int r = 0; r < many; r++)
#pragma GCC unroll 4
    for (int b = 0; b < n; b++) total[r][b] = more[r][b] = _mm512_setzero_si512();
#define ADD(to, from, load)                                                                      \
  {                                                                                              \
    __m512i codes[TILE];                                                                         \
    _Pragma("GCC unroll 4") for (int r = 0; r < many; r++) codes[r] = _mm512_cvtepi8_epi16(load); \
    _Pragma("GCC unroll 4") for (int b = 0; b < n; b++) {                                        \
      __m512i own = _mm512_load_si512(x + b * apart + (from));                                  \
      _Pragma("GCC unroll 4") for (int r = 0; r < many; r++) pairs_added(&to[r][b], codes[r], own); \
    }                                                                                            \
  }
#define SCALE(r) *(const float *)scales_at(w, place + (r))
#define FULL(from) _mm256_loadu_si256((const __m256i *)(row[r] + (from)))
  if (C % GROUP) /* first, so that nothing is moved between loops */
    ADD(total, C / GROUP * GROUP, _mm256_maskz_loadu_epi8(((__mmask32)1 << C % GROUP) - 1, row[r] + C / GROUP * GROUP))
  if (two)
    for (; c + 2 * GROUP <= C; c += 2 * GROUP) {
      ADD(total, c, FULL(c))
      ADD(more, c + GROUP, FULL(c + GROUP))
    }
  for (; c + GROUP <= C; c += GROUP) ADD(total, c, FULL(c))
#undef ADD
#undef FULL
  __m512 sums[TILE][TILE];
#pragma GCC unroll 4
  for (int r = 0; r < many; r++)
#pragma GCC unroll 4
    for (int b = 0; b < n; b++)
      sums[b][r] = _mm512_cvtepi32_ps(two ? _mm512_add_epi32(total[r][b], more[r][b]) : total[r][b]);
#pragma GCC unroll 4
  for (int b = 0; b < n; b++) {
    float unit = in->units[first + b];
    if (many == 4) {
      __m128 scales = _mm_setr_ps(SCALE(0), SCALE(1), SCALE(2), SCALE(3));
      _mm_storeu_ps(out + b * step, _mm_mul_ps(_mm_mul_ps(four_sums(sums[b]), _mm_set1_ps(unit)), scales));
    } else
      for (int r = 0; r < many; r++) out[b * step + r] = _mm512_reduce_add_ps(sums[b][r]) * unit * SCALE(r);
  }
#undef SCALE
}

inline void whole_dots_4(const weight *w, long place, int many, const inputs *in, long first, int n, float *out,
                         long step) {
  const __m512i each = _mm512_set_epi16(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0,
                                        0, 0, 0, 0);
  long C = w->columns, apart = in->step;
  const char *row[TILE];
  const uint16_t *scale[TILE];
  const int16_t *x = in->whole + first * apart;
  __m512 total[TILE][TILE];
#pragma GCC unroll 4
  for (int r = 0; r < many; r++) {
    row[r] = row_at(w, place + r), scale[r] = scales_at(w, place + r);
#pragma GCC unroll 4
    for (int b = 0; b < n; b++) total[r][b] = _mm512_setzero_ps();
  }
  for (long c = 0; c < C; c += WIDE) {
    long groups = (C - c) / GROUP;
    __m512i codes[TILE][4];
    __m512 by[TILE];
#pragma GCC unroll 4
    for (int r = 0; r < many; r++) {
      __m512i bytes, factors;
      if (groups >= 4) {
        bytes = _mm512_loadu_si512(row[r] + c / 2);
        factors = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)(scale[r] + c / GROUP)));
      } else {
        bytes = _mm512_maskz_loadu_epi8(((__mmask64)1 << 16 * groups) - 1, row[r] + c / 2);
        factors = _mm512_castsi128_si512(_mm_maskz_loadu_epi16((1 << groups) - 1, scale[r] + c / GROUP));
      }
      nibbles(bytes, codes[r]);
      /* a bfloat16 in the upper half of a lane is a float */
      by[r] = (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, each, factors);
    }
#pragma GCC unroll 4
    for (int b = 0; b < n; b++) {
      __m512i own[4], zero = _mm512_load_si512(in->zeros + ((first + b) * apart + c) / 8);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) own[i] = _mm512_load_si512(x + b * apart + c + 32 * i);
#pragma GCC unroll 4
      for (int r = 0; r < many; r++) {
        __m512i sum = zero;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) pairs_added(&sum, codes[r][i], own[i]);
        total[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by[r], total[r][b]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < many; r++)
#pragma GCC unroll 4
    for (int b = 0; b < n; b++) out[b * step + r] = _mm512_reduce_add_ps(total[r][b]) * in->units[first + b];
}

/* what makes z [SUMMED] whole numbers, and their unit */
inline float rounded(const __m512 *z, __m512 *by) {
  __m512 size = _mm512_max_ps(_mm512_abs_ps(z[0]), _mm512_abs_ps(z[1]));
  int odd = _mm512_cmp_ps_mask(_mm512_abs_ps(z[0]), _mm512_set1_ps(INFINITY), _CMP_NLT_UQ) |
            _mm512_cmp_ps_mask(_mm512_abs_ps(z[1]), _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
  float largest = odd ? 0 : _mm512_reduce_max_ps(size);
  *by = _mm512_set1_ps(largest > 1e-30f ? LARGEST / largest : 0);
  return odd ? NAN : largest / LARGEST;
}

inline void as_words(const __m512 *z, __m512 by, int32_t *pairs) {
  for (int i = 0; i < SUMMED / LANES; i++)
    _mm256_store_si256((__m256i *)pairs + i, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(z[i], by))));
}

/* `add` of SUMMED rows: rows in pairs, whose codes lie side by side. Fetched meanwhile: the rows after them. */
inline void whole_adds_8(const weight *w, long place, long end, const float *z, long step, float *y, int n) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  long C = w->columns;
  const char *row[SUMMED];
  soon next = rows_soon(w, place + SUMMED, SUMMED, end);
  float scales[SUMMED], units[AT_ONCE];
  int32_t pairs[AT_ONCE][SUMMED / 2] __attribute__((aligned(32)));
  for (int r = 0; r < SUMMED; r++) {
    row[r] = row_at(w, place + r), scales[r] = *(const float *)scales_at(w, place + r);
  }
  for (int b = 0; b < n; b++) {
    __m512 own[SUMMED / LANES], by;
    for (int i = 0; i < SUMMED / LANES; i++)
      own[i] = _mm512_mul_ps(_mm512_loadu_ps(z + b * step + i * LANES), _mm512_loadu_ps(scales + i * LANES));
    units[b] = rounded(own, &by);
    as_words(own, by, pairs[b]);
  }
  for (long c = 0; c < C; c += GROUP) {
    __mmask32 there = C - c < GROUP ? ((__mmask32)1 << (C - c)) - 1 : ~(__mmask32)0;
    __m512i low[AT_ONCE], high[AT_ONCE];
#pragma GCC unroll 8
    for (int b = 0; b < n; b++) low[b] = high[b] = _mm512_setzero_si512();
    fetch(&next, SUMMED * GROUP);
#pragma GCC unroll 1
    for (int p = 0; p < SUMMED / 2; p++) {
      __m512i one = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, row[2 * p] + c));
      __m512i other = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, row[2 * p + 1] + c));
      __m512i l = _mm512_unpacklo_epi16(one, other), h = _mm512_unpackhi_epi16(one, other);
#pragma GCC unroll 8
      for (int b = 0; b < n; b++) {
        __m512i by = _mm512_set1_epi32(pairs[b][p]);
        pairs_added(low + b, l, by), pairs_added(high + b, h, by);
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < n; b++) {
      float *to = y + b * C + c;
      __m512 unit = _mm512_set1_ps(units[b]);
      __mmask16 some = there, rest = there >> LANES;
      __m512 l = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(low[b], first, high[b]));
      __m512 h = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(low[b], second, high[b]));
      _mm512_mask_storeu_ps(to, some, _mm512_fmadd_ps(l, unit, _mm512_maskz_loadu_ps(some, to)));
      _mm512_mask_storeu_ps(to + LANES, rest, _mm512_fmadd_ps(h, unit, _mm512_maskz_loadu_ps(rest, to + LANES)));
    }
  }
}

inline void whole_adds_4(const weight *w, long place, long end, const float *z, long step, float *y, int n) {
  const __m512i half = _mm512_set1_epi16(15), zero = _mm512_set1_epi16(8);
  long C = w->columns;
  const char *row[SUMMED];
  soon next = rows_soon(w, place + SUMMED, SUMMED, end);
  const uint16_t *scale[SUMMED];
  float units[AT_ONCE];
  __m512 inner[AT_ONCE][SUMMED / LANES];
  for (int r = 0; r < SUMMED; r++) row[r] = row_at(w, place + r), scale[r] = scales_at(w, place + r);
  for (int b = 0; b < n; b++) {
    __m512 by;
    for (int i = 0; i < SUMMED / LANES; i++) inner[b][i] = _mm512_loadu_ps(z + b * step + i * LANES);
    units[b] = rounded(inner[b], &by);
    for (int i = 0; i < SUMMED / LANES; i++) inner[b][i] = _mm512_mul_ps(inner[b][i], by);
  }
  for (long c = 0; c < C; c += GROUP) {
    int32_t pairs[AT_ONCE][SUMMED / 2] __attribute__((aligned(32)));
    float factors[SUMMED] __attribute__((aligned(64)));
    __m512 most = _mm512_setzero_ps();
    __m512i low[AT_ONCE], high[AT_ONCE];
    for (int r = 0; r < SUMMED; r++) factors[r] = widen(scale[r][c / GROUP]);
    for (int i = 0; i < SUMMED / LANES; i++)
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_load_ps(factors + i * LANES)));
    float largest = _mm512_reduce_max_ps(most), rest = largest > 1e-30f ? 1 / largest : 0;
    for (int i = 0; i < SUMMED / LANES; i++)
      _mm512_store_ps(factors + i * LANES, _mm512_mul_ps(_mm512_load_ps(factors + i * LANES), _mm512_set1_ps(rest)));
#pragma GCC unroll 8
    for (int b = 0; b < n; b++) {
      low[b] = high[b] = _mm512_setzero_si512();
      for (int i = 0; i < SUMMED / LANES; i++)
        _mm256_store_si256((__m256i *)pairs[b] + i, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(
                                                        _mm512_mul_ps(inner[b][i], _mm512_load_ps(factors + i * LANES)))));
    }
    fetch(&next, SUMMED * GROUP / 2);
#pragma GCC unroll 1
    for (int p = 0; p < SUMMED / 2; p++) {
      __m128i one = _mm_loadu_si128((const __m128i *)(row[2 * p] + c / 2));
      __m128i other = _mm_loadu_si128((const __m128i *)(row[2 * p + 1] + c / 2));
      __m512i both = _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(one, other), _mm_unpacklo_epi8(one, other)));
      __m512i l = _mm512_sub_epi16(_mm512_and_si512(both, half), zero);
      __m512i h = _mm512_sub_epi16(_mm512_srli_epi16(both, 4), zero);
#pragma GCC unroll 8
      for (int b = 0; b < n; b++) {
        __m512i own = _mm512_set1_epi32(pairs[b][p]);
        pairs_added(low + b, l, own), pairs_added(high + b, h, own);
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < n; b++) {
      float *to = y + b * C + c;
      __m512 unit = _mm512_set1_ps(units[b] * largest);
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[b]), unit, _mm512_loadu_ps(to)));
      _mm512_storeu_ps(to + LANES, _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[b]), unit, _mm512_loadu_ps(to + LANES)));
    }
  }
}
#else
static long inputs_room(long C, long B) { return 0; }
static inputs prepare(int bits, int type, const float *x, long C, long B, float *room) {
  inputs in = {.x = x, .bits = bits, .columns = C};
  return in;
}
#endif

/* inputs from the b-th on */
static inputs from_input(const inputs *in, long b) {
  inputs own = *in;
  own.x += b * in->columns;
  if (in->whole) own.whole += b * in->step, own.zeros += b * in->step / 8, own.units += b;
  return own;
}
