#pragma once
/* Products with rows of weights, on a CPU: few inputs at a time, each chosen row read once, where it lies.

   32 bits: float [R, C]. 16 bits: bfloat16 [R, C]. 8 bits: int8 [R, C], a float scale a row. 4 bits: two codes a byte
   [R, C / 2], a bfloat16 scale for 32 columns; of 32 columns the first 16 lie in the low halves, a code of 8 is zero.
   `rows` names the rows (NULL: the first `count`). Inputs and outputs are float or bfloat16 (`type` 32 or 16). All sums
   are in float, in an order that depends on the number of threads alone. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_max_threads(void) { return 1; }
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define GROUP 32
#define TILE 4    /* rows, and inputs, whose products are taken side by side */
#define AT_ONCE 8 /* rows that are added up before the sum goes back to memory */
#define BLOCK 64  /* results that are rounded together */
#define AHEAD 2   /* chosen rows that are fetched before they are read */
#define LINE 64   /* bytes of a line of the cache */
#define inline static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef struct {
  int bits;
  const char *codes;
  const void *scales;
  const int32_t *rows;
  long columns, first; /* the first row: what `rows` counts from */
} weight;

inline floats spread(float value) { return value - (floats){0}; }

inline floats widened(const uint16_t *halves) {
#ifdef __AVX512F__
  return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)halves)), 16);
#else
  ints out;
  for (int i = 0; i < LANES; i++) out[i] = (int32_t)((uint32_t)halves[i] << 16);
  return (floats)out;
#endif
}

inline float widen(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline floats eight(const int8_t *codes) {
#ifdef __AVX512F__
  return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
#else
  floats out;
  for (int i = 0; i < LANES; i++) out[i] = codes[i];
  return out;
#endif
}

inline void four(const uint8_t *codes, floats *low, floats *high) {
#ifdef __AVX512F__
  /* a permutation reads four bits of an index, so it is mask, conversion and subtraction in one */
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
  *low = (floats)_mm512_permutexvar_ps(both, table);
  *high = (floats)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
#else
  for (int i = 0; i < LANES; i++) {
    (*low)[i] = (float)(codes[i] & 15) - 8;
    (*high)[i] = (float)(codes[i] >> 4) - 8;
  }
#endif
}

inline float sum(floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float total[LANES];
  memcpy(total, &x, sizeof x);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) total[i] += total[i + half];
  return total[0];
}

inline const char *row_at(const weight *w, long place) {
  return w->codes + (w->first + (w->rows ? w->rows[place] : place)) * w->columns * w->bits / 8;
}

inline const void *scales_at(const weight *w, long place) {
  long row = w->first + (w->rows ? w->rows[place] : place);
  if (w->bits == 8) return (const float *)w->scales + row;
  return w->bits == 4 ? (const uint16_t *)w->scales + row * (w->columns / GROUP) : NULL;
}

/* 32 codes from column c on, without their scale */
inline void codes_at(int bits, const char *row, long c, floats *low, floats *high) {
  if (bits == 4) four((const uint8_t *)row + c / 2, low, high);
  if (bits == 8) *low = eight((const int8_t *)row + c), *high = eight((const int8_t *)row + c + LANES);
  if (bits == 16) *low = widened((const uint16_t *)row + c), *high = widened((const uint16_t *)row + c + LANES);
  if (bits == 32) *low = *(const floats *)((const float *)row + c), *high = *(const floats *)((const float *)row + c + LANES);
}

inline float code_at(int bits, const char *row, long c) { /* of the columns after the last 32: never 4 bits */
  return bits == 8 ? ((const int8_t *)row)[c] : bits == 16 ? widen(((const uint16_t *)row)[c]) : ((const float *)row)[c];
}

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

/* y[b * step + place - from] = x[b] row, for places from `from` to `to` */
static void many_dots(const weight *w, long from, long to, const float *x, float *y, long step, long B) {
  long n;
  for (long b = 0; b < B; b += n) {
    const float *own = x + b * w->columns;
    float *out = y + b * step - from;
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

/* e^x within 2 units of the last place; as a polynomial, because a library's takes one value at a time */
inline floats exponential(floats x) {
  const float most = 88.0f, least = -87.0f;
  for (int i = 0; i < LANES; i++) x[i] = x[i] > most ? most : x[i] < least ? least : x[i];
  floats shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f; /* 1.5 * 2^23: rounds to integers */
  ints exponent = (ints)shifted - 0x4b400000;
  floats r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (floats)((exponent + 127) << 23);
}

enum { SILU, GELU, GELU_TANH, RELU };

inline floats activated(floats v, int act) {
  if (act == SILU) return v / (1.0f + exponential(-v));
  /* (1 + tanh(u)) / 2 = 1 / (1 + e^-2u) */
  if (act == GELU_TANH) return v / (1.0f + exponential(-1.5957691216057308f * (v + 0.044715f * v * v * v)));
  for (int i = 0; i < LANES; i++)
    v[i] = act == RELU ? (v[i] > 0 ? v[i] : 0) : 0.5f * v[i] * (1.0f + erff(v[i] * 0.70710678f));
  return v;
}

/* the sum of every thread's part [B, C], of what is added to it [B, C], and of a bias [C] */
static void reduce(const float *parts, const float *more, const float *bias, void *y, int type, long C, long B) {
  int threads = omp_get_num_threads();
#pragma omp for schedule(static)
  for (long i = 0; i < B * C; i++) {
    float total = bias ? bias[i % C] : 0;
    for (int t = 0; t < threads; t++) total += parts[t * B * C + i];
    if (more) total = (type == 32 ? total : widen(narrow(total))) + more[i];
    write_out(y, type, i, total);
  }
}

/* An FFN of `count` neurons, and the branch beside it: act(x gate) (x up) down + x left right + last. */
typedef struct {
  weight gate, up, down, left, right; /* up, down: a neuron a row; left, right: [rank, D]; one that is not there has no codes */
  long count, rank, apart;
  int gated, act, type;     /* without a gate, `gate` is up; the type of inputs and outputs */
  const float *bias;        /* of gate and then of up, of all neurons there are, or NULL */
  const uint8_t *keep;      /* a byte a neuron [B, count], or NULL */
  const float *threshold;   /* one an input, `apart` places apart: of what |act(gate)| is below it, up and down are not
                               read; or NULL */
  const float *last;        /* [D], or NULL */
  long width;               /* all neurons there are */
} ffn;

/* what a thread needs of memory, in floats, beside its sum: shared by all */
static long ffn_room(const ffn *f, long B) {
  long step = (f->count + LANES - 1) / LANES * LANES;
  return 2 * B * step + B * f->rank + (f->threshold ? step : 0);
}

/* this thread's part of the sum for inputs [B, D], added to own [B, D] */
static void ffn_part(const ffn *f, const float *in, float *room, float *own, long B) {
  long step = (f->count + LANES - 1) / LANES * LANES, from, to, D = f->gate.columns;
  float *a = room, *z = a + B * step, *inner = z + B * step;
  const int32_t *rows = f->gate.rows;
  own_part(f->count, LANES, &from, &to);
  if (from < to) {
    for (long b = 0; b < B; b++) memset(a + b * step + to, 0, sizeof(float) * (-to & (LANES - 1)));
    many_dots(&f->gate, from, to, in, a + from, step, B);
    if (f->gated && !f->threshold) many_dots(&f->up, from, to, in, z + from, step, B);
  }
  for (long b = 0; b < B; b++) {
    float *own_a = a + b * step, *own_z = z + b * step;
    const uint8_t *keep = f->keep ? f->keep + b * f->count : NULL;
    const float *up_bias = f->bias && f->gated ? f->bias + f->width : NULL;
    for (long p = from; f->bias && p < to; p++) own_a[p] += f->bias[rows ? rows[p] : p];
    for (long p = from; p < to; p += LANES) *(floats *)(own_a + p) = activated(*(floats *)(own_a + p), f->act);
    if (!f->threshold) {
      for (long p = from; p < to; p++) {
        if (keep && !keep[p]) own_z[p] = 0;
        else own_z[p] = own_a[p] * (f->gated ? own_z[p] + (up_bias ? up_bias[rows ? rows[p] : p] : 0) : 1);
      }
      continue;
    }
    weight up = f->up, down = f->down;
    int32_t *row = (int32_t *)(inner + B * f->rank) + from;
    long many = 0;
    for (long p = from; p < to; p++)
      if (fabsf(own_a[p]) >= f->threshold[b * f->apart] && !(keep && !keep[p]))
        own_a[from + many] = own_a[p], row[many++] = rows ? rows[p] : (int32_t)p;
    up.rows = down.rows = row;
    if (f->gated) many_dots(&up, 0, many, in + b * D, own_z + from, step, 1);
    for (long i = 0; i < many; i++)
      own_z[from + i] = own_a[from + i] * (f->gated ? own_z[from + i] + (up_bias ? up_bias[row[i]] : 0) : 1);
    many_adds(&down, 0, many, many, own_z + from, step, own + b * D, 1);
  }
  if (!f->threshold) many_adds(&f->down, from, to, to, z + from, step, own, B);
  own_part(f->rank, 1, &from, &to);
  many_dots(&f->left, from, to, in, inner + from, f->rank, B);
  many_adds(&f->right, from, to, to, inner + from, f->rank, own, B);
}
