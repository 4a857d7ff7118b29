/* Products, sums and whole FFNs of a few inputs with rows of weights. */
#include "ffn.h"

/* y [B, count] = x [B, C] with `count` rows; returns 0, or 1 where there is no memory */
int caprese_products(int bits, const void *codes, const void *scales, const int32_t *rows, long count, long C,
                     const void *x, void *y, int type, long B) {
  const weight w = {bits, codes, scales, rows, C, 0};
  int threads = omp_get_max_threads();
  long each = inputs_room(C, B);
  float *room = malloc(sizeof(float) * (B * C + threads * each));
  if (!room) return 1;
  const float *wide = read_in(x, type, B * C, room);
#pragma omp parallel num_threads(threads)
  {
    inputs in = prepare(bits, type, wide, C, B, room + B * C + omp_get_thread_num() * each);
    long from, to;
    own_part(count, AT_ONCE, &from, &to);
    if (type == 32) many_dots(&w, from, to, &in, (float *)y + from, count, B);
    else
      for (long p = from; p < to; p += BLOCK) {
        float out[BLOCK * 64];
        long end = p + BLOCK < to ? p + BLOCK : to;
        for (long b = 0; b < B; b += 64) {
          long n = B - b < 64 ? B - b : 64;
          inputs own = from_input(&in, b);
          many_dots(&w, p, end, &own, out, BLOCK, n);
          for (long i = 0; i < n; i++)
            for (long q = p; q < end; q++) write_out(y, type, (b + i) * count + q, out[i * BLOCK + q - p]);
        }
      }
  }
  free(room);
  return 0;
}

/* y [B, C] = z [B, count] times `count` rows; returns as above */
int caprese_sums(int bits, const void *codes, const void *scales, const int32_t *rows, long count, long C,
                 const void *z, void *y, int type, long B) {
  const weight w = {bits, codes, scales, rows, C, 0};
  int threads = omp_get_max_threads();
  float *parts = malloc(sizeof(float) * (threads * B * C + (type == 32 ? 0 : B * count)));
  if (!parts) return 1;
  const float *in = read_in(z, type, B * count, parts + threads * B * C);
#pragma omp parallel num_threads(threads)
  {
    long from, to;
    float *own = parts + omp_get_thread_num() * B * C;
    memset(own, 0, sizeof(float) * B * C);
    own_part(count, AT_ONCE, &from, &to);
    many_adds(&w, from, to, type, in + from, count, own, B);
#pragma omp barrier
    reduce(parts, NULL, NULL, y, type, C, B);
  }
  free(parts);
  return 0;
}

/* y [B, D] = the FFN of x [B, D]; returns as above */
int caprese_ffn(const ffn *f, const void *x, void *y, long B) {
  int threads = omp_get_max_threads();
  long D = f->gate.columns;
  long each = inputs_room(D, B);
  float *parts = malloc(sizeof(float) * ((threads + 1) * B * D + threads * each + ffn_room(f, B)));
  if (!parts) return 1;
  float *rooms = parts + (threads + 1) * B * D, *room = rooms + threads * each;
  const float *wide = read_in(x, f->type, B * D, parts + threads * B * D);
#pragma omp parallel num_threads(threads)
  {
    float *own = parts + omp_get_thread_num() * B * D;
    inputs in = prepare(f->gate.bits, f->type, wide, D, B, rooms + omp_get_thread_num() * each);
    memset(own, 0, sizeof(float) * B * D);
    ffn_part(f, &in, room, own, B);
#pragma omp barrier
    reduce(parts, NULL, f->last, y, f->type, D, B);
  }
  free(parts);
  return 0;
}
