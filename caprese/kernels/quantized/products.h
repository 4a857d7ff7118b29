/* Products of a few inputs with rows, and sums of rows. */
#pragma once
#include "whole.h"

/* out[b * step + r] = x[b] row r, for `many` rows and n inputs; one at a time, rows are read one after the other, which
   is what memory is fastest at; several, `next` is fetched meanwhile */
inline void dots(const weight *w, int bits, long place, int many, const char *ahead, soon *next, const float *x, int n,
                 float *out, long step) {
  long C = w->columns, c = 0;
  floats total[TILE][TILE] = {0};
  const char *row[TILE];
  const void *scale[TILE];
  for (int r = 0; r < many; r++) row[r] = row_at(w, place + r), scale[r] = scales_at(w, place + r);
  long each = next ? next->many * next->bytes / (C / GROUP + 1) + LINE : 0;
  for (; c + GROUP <= C; c += GROUP) {
    if (next) fetch(next, each);
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

/* y[b] += sum over `many` places of z[b * step + r] row r, for n inputs. The rows after them are fetched meanwhile. */
inline void add(const weight *w, int bits, long place, int many, long end, const float *z, long step, float *y, int n) {
  long C = w->columns, c = 0;
  const char *row[AT_ONCE];
  soon next = rows_soon(w, place + many, many, end);
  const void *scale[AT_ONCE];
  float factor[AT_ONCE][AT_ONCE];
  for (int r = 0; r < many; r++) {
    row[r] = row_at(w, place + r), scale[r] = scales_at(w, place + r);
    for (int b = 0; b < n; b++) factor[b][r] = z[b * step + r] * (bits == 8 ? *(const float *)scale[r] : 1);
  }
  for (; c + GROUP <= C; c += GROUP) {
    floats low[AT_ONCE], high[AT_ONCE];
    fetch(&next, many * GROUP * bits / 8);
    for (int b = 0; b < n; b++) low[b] = *(floats *)(y + b * C + c), high[b] = *(floats *)(y + b * C + c + LANES);
    for (int r = 0; r < many; r++) {
      floats l, h, own = {0};
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

/* y[b * step + place - from] = x[b] row, for places from `from` to `to`. Some rows meet all inputs, while the next ones are
   fetched. */
APART void many_dots(const weight *w, long from, long to, const inputs *in, float *y, long step, long B) {
  long n, last;
  for (long start = from; start < to; start = last) {
    last = start + NEAR < to ? start + NEAR : to;
    for (long b = 0; b < B; b += n) {
      const float *own = in->x + b * w->columns;
      float *out = y + b * step - from;
#ifdef __AVX512VNNI__
      if (in->whole && in->bits == w->bits) {
#define CALL(bits, count, most)                                                                                      \
  n = count;                                                                                                         \
  long p = start;                                                                                                    \
  if (n > 1)                                                                                                         \
    for (; p + ROWS_##bits <= last; p += ROWS_##bits) {                                                              \
      long before = b * (last - start) + n * (p - start);                                                            \
      long next = last + before / B, after = last + (before + n * ROWS_##bits) / B;                                  \
      soon rows = rows_soon(w, next, after - next, to);                                                              \
      fetch(&rows, (after - next) * rows.bytes);                                                                     \
      whole_dots_##bits(w, p, ROWS_##bits, in, b, count, out + p, step);                                             \
    }                                                                                                                \
  for (; p < last; p++) whole_dots_##bits(w, p, 1, in, b, count, out + p, step);
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
  long p = start;                                                                                                    \
  if (n > 1)                                                                                                         \
    for (; p + TILE <= last; p += TILE) {                                                                            \
      long before = b * (last - start) + n * (p - start);                                                            \
      long next = last + before / B, after = last + (before + n * TILE) / B;                                         \
      soon rows = rows_soon(w, next, after - next, to);                                                              \
      dots(w, bits, p, TILE, NULL, &rows, own, count, out + p, step);                                                \
    }                                                                                                                \
  for (; p < last; p++)                                                                                              \
    dots(w, bits, p, 1, w->rows && p + AHEAD < to ? row_at(w, p + AHEAD) : NULL, NULL, own, count, out + p, step);
#define BITS(bits) INPUTS(B - b, TILE, bits, CALL)
      FOR_BITS(w, BITS)
#undef CALL
#undef BITS
    }
  }
}

/* y[b] += z[b * step + place - from] row, for places from `from` to `to`; `type` of the inputs that z comes from */
APART void many_adds(const weight *w, long from, long to, int type, const float *z, long step, float *y, long B) {
  long n, last;
  for (long start = from; start < to; start = last) {
    last = start + NEAR < to ? start + NEAR : to;
    for (long b = 0; b < B; b += n) {
      const float *in = z + b * step - from;
      float *own = y + b * w->columns;
      long p = start;
#ifdef __AVX512VNNI__
#define CALL(bits, count) \
  for (; p + SUMMED <= last; p += SUMMED) whole_adds_##bits(w, p, to, in + p, step, own, count);
      if (type == 16 && B - b >= TILE) { /* fewer do not pay for making z whole */
        n = B - b >= AT_ONCE ? AT_ONCE : TILE;
        if (w->bits == 8 && n == AT_ONCE) CALL(8, AT_ONCE)
        else if (w->bits == 8) CALL(8, TILE)
        else if (w->bits == 4 && n == AT_ONCE) CALL(4, AT_ONCE)
        else if (w->bits == 4) CALL(4, TILE)
      }
#undef CALL
#endif
#define CALL(bits, count, most)                                                                     \
  n = count;                                                                                        \
  for (; p + AT_ONCE <= last; p += AT_ONCE) add(w, bits, p, AT_ONCE, to, in + p, step, own, count); \
  for (; p < last; p++) add(w, bits, p, 1, to, in + p, step, own, count);
#define BITS(bits) INPUTS(B - b, AT_ONCE, bits, CALL)
      FOR_BITS(w, BITS)
#undef CALL
#undef BITS
    }
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
