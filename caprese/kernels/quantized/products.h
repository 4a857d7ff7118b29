/* Products of a few inputs with rows, and sums of rows. */
#pragma once
#include "codes.h"

/* out[b * step + r] = x[b] row r, for `many` rows and n inputs; one at a time, rows are read one after the other, which
   is what memory is fastest at */
inline void dots(const weight *w, int bits, long place, int many, const char *ahead, const float *x, int n, float *out,
                 long step) {
  long C = w->columns, c = 0;
  floats total[TILE][TILE] = {0};
  const char *row[TILE];
  const void *scale[TILE];
  for (int r = 0; r < many; r++) row[r] = row_at(w, place + r), scale[r] = scales_at(w, place + r);
  for (; c + GROUP <= C; c += GROUP) {
    for (int r = 0; r < many; r++) {
      floats low, high, factor = {0};
      codes_at(bits, row[r], c, &low, &high);
      if (many == 1 && ahead && c * bits / 8 % LINE == 0) __builtin_prefetch(ahead + c * bits / 8);
      if (bits == 4) factor = spread(widen(((const uint16_t *)scale[r])[c / GROUP]));
      if (bits == 4 && n > 1) low *= factor, high *= factor;
      for (int b = 0; b < n; b++) {
        floats own = low * *(const floats *)(x + b * C + c);
        own += high * *(const floats *)(x + b * C + c + LANES);
        if (bits == 4 && n == 1) own *= factor;
        total[r][b] += own;
      }
    }
  }
  for (int r = 0; r < many; r++)
    for (int b = 0; b < n; b++) {
      float all = sum(total[r][b]);
      for (long i = c; i < C; i++) all += code_at(bits, row[r], i) * x[b * C + i];
      out[b * step + r] = bits == 8 ? all * *(const float *)scale[r] : all;
    }
}

/* y[b] += sum over `many` places of z[b * step + r] row r, for n inputs. The rows after them are fetched meanwhile:
   several streams at a time are more than the processor sees coming. */
inline void add(const weight *w, int bits, long place, int many, long end, const float *z, long step, float *y, int n) {
  long C = w->columns, c = 0;
  const char *row[AT_ONCE], *ahead[AT_ONCE];
  const void *scale[AT_ONCE];
  float factor[AT_ONCE][AT_ONCE];
  for (int r = 0; r < many; r++) {
    row[r] = row_at(w, place + r), scale[r] = scales_at(w, place + r);
    ahead[r] = row_at(w, place + many + r < end ? place + many + r : place + r);
    for (int b = 0; b < n; b++) factor[b][r] = z[b * step + r] * (bits == 8 ? *(const float *)scale[r] : 1);
  }
  for (; c + GROUP <= C; c += GROUP) {
    floats low[AT_ONCE], high[AT_ONCE];
    for (int b = 0; b < n; b++) low[b] = *(floats *)(y + b * C + c), high[b] = *(floats *)(y + b * C + c + LANES);
    for (int r = 0; r < many; r++) {
      floats l, h, own = {0};
      if (c * bits / 8 % LINE == 0) __builtin_prefetch(ahead[r] + c * bits / 8);
      codes_at(bits, row[r], c, &l, &h);
      if (bits == 4) own = spread(widen(((const uint16_t *)scale[r])[c / GROUP]));
      for (int b = 0; b < n; b++) {
        floats by = spread(factor[b][r]);
        if (bits == 4) by *= own;
        low[b] += l * by, high[b] += h * by;
      }
    }
    for (int b = 0; b < n; b++) *(floats *)(y + b * C + c) = low[b], *(floats *)(y + b * C + c + LANES) = high[b];
  }
  for (; c < C; c++)
    for (int b = 0; b < n; b++)
      for (int r = 0; r < many; r++) y[b * C + c] += factor[b][r] * code_at(bits, row[r], c);
}

/* what is constant for the compiler, so that sums stay in registers */
#define FOR_BITS(w, call) \
  switch ((w)->bits) {    \
    case 4: call(4) break; \
    case 8: call(8) break; \
    case 16: call(16) break; \
    default: call(32)     \
  }
#define INPUTS(n, most, bits, call)                             \
  if (most >= 8 && (n) >= 8) { call(bits, 8, most) }            \
  else if ((n) >= 4) { call(bits, 4, most) }                    \
  else if ((n) >= 2) { call(bits, 2, most) }                    \
  else { call(bits, 1, most) }

/* Inputs x [B, C] as a product reads them: floats, and where they are bfloat16, the weights codes, and the processor
   multiplies bytes, whole numbers of `unit` each, 127 * 128 to the largest, in two planes of seven bits. That rounds finer
   than bfloat16 does; products are then exact. (With a third plane, for floats, it is no faster than floats are.) */
typedef struct {
  const float *x;
  const int8_t *planes; /* [B, 2, padded]; for 4 bits of 128 columns first the low halves' 64, then the high ones'; or NULL */
  const float *units;   /* [B] */
  const float *zeros;   /* what a code of zero adds: 8 bits [B], 4 bits [B, padded / 8] */
  int bits;
  long padded, columns;
} inputs;

#ifdef __AVX512VNNI__
#define WIDE 128
/* floats of memory that `prepare` needs */
static long inputs_room(long C, long B) { return B * ((C + WIDE - 1) / WIDE * WIDE + 2); }

static inputs prepare(int bits, int type, const float *x, long C, long B, float *room) {
  inputs in = {.x = x, .bits = bits, .columns = C};
  if (bits > 8 || type == 32) return in;
  in.padded = (C + WIDE - 1) / WIDE * WIDE;
  float *units = room, *zeros = room + B;
  int8_t *planes = (int8_t *)(zeros + (bits == 8 ? B : B * in.padded / 8));
  in.planes = planes, in.units = units, in.zeros = zeros;
  for (long b = 0; b < B; b++, x += C, planes += 2 * in.padded) {
    __m512 most = _mm512_setzero_ps();
    int odd = 0; /* whether there is what is no finite number */
    for (long c = 0; c < C; c += LANES) {
      __mmask16 there = C - c < LANES ? (1 << (C - c)) - 1 : 0xffff;
      __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(there, x + c));
      odd |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
      most = _mm512_max_ps(most, size);
    }
    float largest = odd ? 0 : _mm512_reduce_max_ps(most), all = 0;
    units[b] = odd ? NAN : largest / (127 * 128);
    __m512 by = _mm512_set1_ps(largest > 1e-30f ? 127 * 128 / largest : 0);
    for (long c = 0; c < in.padded; c += LANES) {
      __mmask16 there = c >= C ? 0 : C - c < LANES ? (1 << (C - c)) - 1 : 0xffff;
      __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(odd ? 0 : there, x + c), by));
      __m512i half = _mm512_set1_epi32(64), low = _mm512_and_epi32(_mm512_add_epi32(whole, half), _mm512_set1_epi32(127));
      long to = c, total = _mm512_reduce_add_epi32(whole);
      if (bits == 4) { /* of every 32 the first sixteen to the low 64, the others to the high ones */
        long at = c % WIDE / LANES;
        to = c - c % WIDE + at % 2 * (WIDE / 2) + at / 2 * LANES;
        float *zero = zeros + b * in.padded / 8 + c / GROUP * 4, own = -32.0f * total;
        for (int i = 0; i < 4; i++) zero[i] = c % GROUP ? zero[i] + own : own;
      }
      all += total;
      low = _mm512_sub_epi32(low, half);
      whole = _mm512_srai_epi32(_mm512_sub_epi32(whole, low), 7);
      _mm_storeu_si128((__m128i *)(planes + to), _mm512_cvtepi32_epi8(whole));
      _mm_storeu_si128((__m128i *)(planes + in.padded + to), _mm512_cvtepi32_epi8(low));
    }
    if (bits == 8) zeros[b] = -128 * all;
  }
  return in;
}

/* `dots` in whole numbers, of one row; unrolled early, so that sums are in registers */
inline void whole_dots(const weight *w, int bits, long place, const inputs *in, long first, int n, float *out, long step) {
  long C = w->columns, padded = in->padded;
  const char *row = row_at(w, place);
  const int8_t *x = in->planes + first * 2 * padded;
  if (bits == 8) {
    __m512i upper[TILE], lower[TILE];
#pragma GCC unroll 8
    for (int b = 0; b < n; b++) upper[b] = lower[b] = _mm512_setzero_si512();
    for (long c = 0; c < C; c += 64) {
      __mmask64 there = C - c < 64 ? ((__mmask64)1 << (C - c)) - 1 : ~(__mmask64)0;
      __m512i codes = C - c < 64 ? _mm512_maskz_loadu_epi8(there, row + c) : _mm512_loadu_si512(row + c);
      codes = _mm512_xor_si512(codes, _mm512_set1_epi8((char)0x80)); /* from 1 to 255 */
#pragma GCC unroll 8
      for (int b = 0; b < n; b++) {
        upper[b] = _mm512_dpbusd_epi32(upper[b], codes, _mm512_loadu_si512(x + 2 * b * padded + c));
        lower[b] = _mm512_dpbusd_epi32(lower[b], codes, _mm512_loadu_si512(x + (2 * b + 1) * padded + c));
      }
    }
    float scale = *(const float *)scales_at(w, place);
#pragma GCC unroll 8
    for (int b = 0; b < n; b++) {
      double all = 128.0 * _mm512_reduce_add_epi32(upper[b]) + _mm512_reduce_add_epi32(lower[b]) + in->zeros[first + b];
      out[b * step] = all * in->units[first + b] * scale;
    }
    return;
  }
  const __m512i each = _mm512_set_epi16(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0,
                                        0, 0, 0, 0);
  const uint16_t *scale = scales_at(w, place);
  __m512 total[TILE];
#pragma GCC unroll 8
  for (int b = 0; b < n; b++) total[b] = _mm512_setzero_ps();
  for (long c = 0; c < C; c += WIDE) {
    long groups = (C - c) / GROUP;
    __m512i codes, factors;
    if (groups >= 4) {
      codes = _mm512_loadu_si512(row + c / 2);
      factors = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)(scale + c / GROUP)));
    } else {
      codes = _mm512_maskz_loadu_epi8(((__mmask64)1 << 16 * groups) - 1, row + c / 2);
      factors = _mm512_castsi128_si512(_mm_maskz_loadu_epi16((1 << groups) - 1, scale + c / GROUP));
    }
    /* a bfloat16 in the upper half of a lane is a float */
    __m512 by = (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, each, factors);
    __m512i low = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    __m512i high = _mm512_and_si512(codes, _mm512_set1_epi8((char)0xf0)); /* sixteen times the code */
#pragma GCC unroll 8
    for (int b = 0; b < n; b++) {
      const int8_t *own = x + 2 * b * padded + c, *rest = own + padded;
      __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(own));
      __m512i lower = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(rest));
      upper = _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 4), high, _mm512_loadu_si512(own + 64));
      lower = _mm512_dpbusd_epi32(_mm512_slli_epi32(lower, 4), high, _mm512_loadu_si512(rest + 64));
      lower = _mm512_add_epi32(_mm512_slli_epi32(upper, 7), lower);
      __m512 sum = _mm512_add_ps(_mm512_cvtepi32_ps(lower), _mm512_loadu_ps(in->zeros + (first + b) * padded / 8 + c / 8));
      total[b] = _mm512_fmadd_ps(sum, by, total[b]);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < n; b++) out[b * step] = _mm512_reduce_add_ps(total[b]) * in->units[first + b] / 16;
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
  if (in->planes) {
    own.planes += b * 2 * in->padded, own.units += b;
    own.zeros += b * (in->bits == 8 ? 1 : in->padded / 8);
  }
  return own;
}

/* y[b * step + place - from] = x[b] row, for places from `from` to `to` */
static void many_dots(const weight *w, long from, long to, const inputs *in, float *y, long step, long B) {
  long n;
  for (long b = 0; b < B; b += n) {
    const float *own = in->x + b * w->columns;
    float *out = y + b * step - from;
#ifdef __AVX512VNNI__
    if (in->planes && in->bits == w->bits) {
#define CALL(bits, some, most) \
  n = some;                    \
  for (long p = from; p < to; p++) whole_dots(w, bits, p, in, b, some, out + p, step);
      if (w->bits == 4) {
        INPUTS(B - b, TILE, 4, CALL)
      } else {
        INPUTS(B - b, TILE, 8, CALL)
      }
#undef CALL
      continue;
    }
#endif
#define CALL(bits, count, most)                                                                                      \
  n = count;                                                                                                         \
  long p = from;                                                                                                     \
  if (n > 1)                                                                                                         \
    for (; p + TILE <= to; p += TILE) dots(w, bits, p, TILE, NULL, own, count, out + p, step);                       \
  for (; p < to; p++)                                                                                                \
    dots(w, bits, p, 1, w->rows && p + AHEAD < to ? row_at(w, p + AHEAD) : NULL, own, count, out + p, step);
#define BITS(bits) INPUTS(B - b, TILE, bits, CALL)
    FOR_BITS(w, BITS)
#undef CALL
#undef BITS
  }
}

/* y[b] += z[b * step + place - from] row, for places from `from` to `to` */
static void many_adds(const weight *w, long from, long to, long end, const float *z, long step, float *y, long B) {
  long n;
  for (long b = 0; b < B; b += n) {
    const float *in = z + b * step - from;
    float *own = y + b * w->columns;
#define CALL(bits, count, most)                                                                      \
  n = count;                                                                                         \
  long p = from;                                                                                     \
  for (; p + AT_ONCE <= to; p += AT_ONCE) add(w, bits, p, AT_ONCE, end, in + p, step, own, count);   \
  for (; p < to; p++) add(w, bits, p, 1, end, in + p, step, own, count);
#define BITS(bits) INPUTS(B - b, AT_ONCE, bits, CALL)
    FOR_BITS(w, BITS)
#undef CALL
#undef BITS
  }
}

/* inputs as floats; `into` where they are not */
static const float *read_in(const void *x, int type, long count, float *into) {
  if (type == 32) return x;
  for (long i = 0; i < count; i++) into[i] = widen(((const uint16_t *)x)[i]);
  return into;
}

static void write_out(void *y, int type, long i, float value) {
  if (type == 32) ((float *)y)[i] = value;
  else ((uint16_t *)y)[i] = narrow(value);
}

/* this thread's part of `count` places, in whole units */
static void own_part(long count, long unit, long *from, long *to) {
  long units = (count + unit - 1) / unit, threads = omp_get_num_threads(), at = omp_get_thread_num();
  *from = units * at / threads * unit, *to = units * (at + 1) / threads * unit;
  if (*to > count) *to = count;
}
