/* Products with a weight in few bits, on a CPU: few inputs at a time, each chosen row read once, where it lies.

   8 bits: int8 [R, C], a float scale a row. 4 bits: two codes a byte [R, C / 2], a bfloat16 scale for 32 columns; of
   32 columns the first 16 lie in the low halves, a code of 8 is zero. `rows` names the rows (NULL: the first `count`).
   All sums are in float32, in an order that depends on the number of threads alone. */
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
#define AHEAD 2  /* chosen rows that are fetched before they are read */
#define LINE 64 /* bytes of a line of the cache */
#define AT_ONCE 8 /* rows that are added up before the sum goes back to memory */
#define inline static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef struct {
  int bits;
  const void *codes, *scales;
  const int32_t *rows;
  long columns, count;
} weight;

inline floats spread(float value) { return value - (floats){0}; }

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

inline floats widened(const uint16_t *half) {
#ifdef __AVX512F__
  return (floats)_mm512_slli_epi32(_mm512_set1_epi16(*half), 16);
#else
  uint32_t bits = (uint32_t)*half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return spread(value);
#endif
}

inline float sum(floats x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

inline long row_of(const weight *w, long place) { return w->rows ? w->rows[place] : place; }

/* y[b] = scale * x[b] row, for n inputs; one row after the other, which is what memory is fastest at */
inline void product(const weight *w, long row, const char *ahead, const float *x, float *y, long step, int n) {
  long C = w->columns, c = 0;
  floats total[AT_ONCE] = {0};
  if (w->bits == 8) {
    const int8_t *codes = (const int8_t *)w->codes + row * C;
    for (; c + LANES <= C; c += LANES) {
      if (ahead && c % LINE == 0) __builtin_prefetch(ahead + c);
      floats v = eight(codes + c);
      for (int b = 0; b < n; b++) total[b] += v * *(const floats *)(x + b * C + c);
    }
    for (int b = 0; b < n; b++) {
      float all = sum(total[b]);
      for (long i = c; i < C; i++) all += codes[i] * x[b * C + i];
      y[b * step] = all * ((const float *)w->scales)[row];
    }
    return;
  }
  const uint8_t *codes = (const uint8_t *)w->codes + row * (C / 2);
  const uint16_t *scales = (const uint16_t *)w->scales + row * (C / GROUP);
  for (; c < C; c += GROUP) {
    floats low, high, scale = widened(scales + c / GROUP);
    if (ahead && c / 2 % LINE == 0) __builtin_prefetch(ahead + c / 2);
    four(codes + c / 2, &low, &high);
    if (n > 1) low *= scale, high *= scale;
    for (int b = 0; b < n; b++) {
      const floats *in = (const floats *)(x + b * C + c);
      floats own = low * in[0];
      own += high * in[1];
      if (n == 1) own *= scale;
      total[b] += own;
    }
  }
  for (int b = 0; b < n; b++) y[b * step] = sum(total[b]);
}

/* y[b] += sum over `many` places of z[b, place] scale row, for n inputs. The rows after them are fetched meanwhile:
   several streams at a time are more than the processor sees coming. */
inline void add(const weight *w, long place, int many, const float *z, long step, float *y, int n) {
  long C = w->columns, c = 0, row[AT_ONCE];
  const char *ahead[AT_ONCE];
  for (int r = 0; r < many; r++) {
    long next = place + many + r < w->count ? row_of(w, place + many + r) : row_of(w, place + r);
    row[r] = row_of(w, place + r);
    ahead[r] = (const char *)w->codes + next * C * w->bits / 8;
  }
  if (w->bits == 8) {
    float factor[AT_ONCE][AT_ONCE];
    for (int b = 0; b < n; b++)
      for (int r = 0; r < many; r++) factor[b][r] = z[b * step + place + r] * ((const float *)w->scales)[row[r]];
    for (; c + LANES <= C; c += LANES) {
      floats total[AT_ONCE];
      for (int b = 0; b < n; b++) total[b] = *(floats *)(y + b * C + c);
      for (int r = 0; r < many; r++) {
        if (c % LINE == 0) __builtin_prefetch(ahead[r] + c);
        floats v = eight((const int8_t *)w->codes + row[r] * C + c);
        for (int b = 0; b < n; b++) total[b] += v * factor[b][r];
      }
      for (int b = 0; b < n; b++) *(floats *)(y + b * C + c) = total[b];
    }
    for (; c < C; c++)
      for (int b = 0; b < n; b++)
        for (int r = 0; r < many; r++) y[b * C + c] += factor[b][r] * ((const int8_t *)w->codes)[row[r] * C + c];
    return;
  }
  for (; c < C; c += GROUP) {
    floats low[AT_ONCE], high[AT_ONCE];
    for (int b = 0; b < n; b++) low[b] = *(floats *)(y + b * C + c), high[b] = *(floats *)(y + b * C + c + LANES);
    for (int r = 0; r < many; r++) {
      floats l, h, scale = widened((const uint16_t *)w->scales + row[r] * (C / GROUP) + c / GROUP);
      if (c / 2 % LINE == 0) __builtin_prefetch(ahead[r] + c / 2);
      four((const uint8_t *)w->codes + (row[r] * C + c) / 2, &l, &h);
      for (int b = 0; b < n; b++) {
        floats factor = scale * z[b * step + place + r];
        low[b] += l * factor, high[b] += h * factor;
      }
    }
    for (int b = 0; b < n; b++) *(floats *)(y + b * C + c) = low[b], *(floats *)(y + b * C + c + LANES) = high[b];
  }
}

/* the number of inputs known to the compiler, so that their sums stay in registers */
#define FOR_INPUTS(B, b, call)                \
  for (long b = 0, n; b < B; b += n) {        \
    if (B - b >= 8) { n = 8; call(8); }       \
    else if (B - b >= 4) { n = 4; call(4); }  \
    else if (B - b >= 2) { n = 2; call(2); }  \
    else { n = 1; call(1); }                  \
  }

/* y [B, count] = x [B, C] with `count` rows */
void caprese_products(int bits, const void *codes, const void *scales, const int32_t *rows, long count, long C,
                      const float *x, float *y, long B) {
  const weight w = {bits, codes, scales, rows, C, count};
#pragma omp parallel for schedule(static)
  for (long r = 0; r < count; r++) {
    long row = row_of(&w, r);
    const char *ahead = rows && r + AHEAD < count ? (const char *)codes + rows[r + AHEAD] * C * bits / 8 : NULL;
#define CALL(n) product(&w, row, ahead, x + b * C, y + b * count + r, count, n)
    FOR_INPUTS(B, b, CALL)
#undef CALL
  }
}

/* y [B, C] = z [B, count] times `count` rows; returns 0, or 1 where there is no memory */
int caprese_sums(int bits, const void *codes, const void *scales, const int32_t *rows, long count, long C,
                 const float *z, float *y, long B) {
  const weight w = {bits, codes, scales, rows, C, count};
  int threads = omp_get_max_threads(), used = 1;
  float *parts = calloc((size_t)threads * B * C, sizeof(float));
  if (!parts) return 1;
#pragma omp parallel num_threads(threads)
  {
    float *own = parts + (size_t)omp_get_thread_num() * B * C;
#pragma omp single
    used = omp_get_num_threads();
#pragma omp for schedule(static)
    for (long block = 0; block < (count + AT_ONCE - 1) / AT_ONCE; block++) {
      long place = block * AT_ONCE;
      if (count - place >= AT_ONCE) {
#define CALL(n) add(&w, place, AT_ONCE, z + b * count, count, own + b * C, n)
        FOR_INPUTS(B, b, CALL)
#undef CALL
      } else {
        for (; place < count; place++)
          for (long b = 0; b < B; b++) add(&w, place, 1, z + b * count, count, own + b * C, 1);
      }
    }
#pragma omp for schedule(static)
    for (long i = 0; i < B * C; i++) {
      float total = 0;
      for (int t = 0; t < used; t++) total += parts[(size_t)t * B * C + i];
      y[i] = total;
    }
  }
  free(parts);
  return 0;
}
