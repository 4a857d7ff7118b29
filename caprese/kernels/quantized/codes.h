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
#define NEAR 32   /* rows that lie in a cache until all inputs have met them */
#define SUMMED 32 /* rows that are added up in whole numbers */
#define AHEAD 2   /* chosen rows that are fetched before they are read */
#define LINE 64   /* bytes of a line of the cache */
#define inline static inline __attribute__((always_inline))

/* Seconds that the first thread has spent in each part of a step; only where it is compiled for measuring. */
enum { NORM, QKV, TURN, ATTEND, OUT, GATE_UP, ACT, DOWN, BRANCH, REDUCE, WAIT, PARTS };
#ifdef CAPRESE_TIMES
#include <time.h>
double caprese_times[PARTS];
static double last_time;
static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}
static void mark(int part) {
  if (omp_get_thread_num()) return;
  double now = seconds();
  caprese_times[part] += now - last_time, last_time = now;
}
#define START last_time = seconds()
#define MARK(part) mark(part)
#else
#define START
#define MARK(part)
#endif

#define APART static __attribute__((noinline, noclone)) /* compiled once */

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

/* Rows to be read soon, brought near line by line, one row after the other: in that order memory is faster than side by
   side, as they are read. */
typedef struct {
  const char *rows[SUMMED];
  long bytes, at; /* of a row, and in the row */
  int many, row;
} soon;

inline soon rows_soon(const weight *w, long place, int many, long end) {
  soon next = {.bytes = w->columns * w->bits / 8};
  for (; next.many < many && place + next.many < end; next.many++) next.rows[next.many] = row_at(w, place + next.many);
  return next;
}

inline void fetch(soon *next, long bytes) {
  for (; bytes > 0 && next->row < next->many; bytes -= LINE) {
    __builtin_prefetch(next->rows[next->row] + next->at);
    if ((next->at += LINE) >= next->bytes) next->at = 0, next->row++;
  }
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
