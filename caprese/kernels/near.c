/* Attention of one token of every sequence over those that it sees of what is held. */
#include <math.h>

/* fewer numbers than these are done before other threads are there */
#define FEW 16384
/* keys whose scores are held at once */
#define HELD 64

/* q and y [B, H, D]; keys and values [B, G, T, D], the heads of which are `apart` numbers from one another; places
   [B, T] of them in their texts, below 0 for what is none; own [B], those of q. Seen is what lies before by less than
   `window`, or is one of the first `sinks`, and lies before by less than `reach`; a query that sees nothing gives 0. */
int caprese_attend(const float *q, const float *keys, const float *values, const long long *places,
                   const long long *own, float *y, long B, long H, long G, long T, long D, long apart, long window,
                   long sinks, long reach, float scale) {
#pragma omp parallel for if (B * H * T * D > FEW)
  for (long at = 0; at < B * H; at++) {
    const long b = at / H, shift = (b * G + at % H * G / H) * apart;
    const float *restrict asked = q + at * D, *restrict key = keys + shift, *restrict value = values + shift;
    const long long *where = places + b * T, here = own[b];
    float *restrict out = y + at * D, scores[HELD], top = -INFINITY, total = 0;
    long seen[HELD];
    for (long d = 0; d < D; d++) out[d] = 0;
    for (long next = 0; next < T;) {
      long count = 0;
      float best = top;
      for (; next < T && count < HELD; next++) {
        const long long back = here - where[next];
        if (where[next] < 0 || back < 0 || back >= reach || (back >= window && where[next] >= sinks)) continue;
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (long d = 0; d < D; d++) score += asked[d] * key[next * D + d];
        seen[count] = next;
        scores[count] = scale * score;
        best = scores[count] > best ? scores[count] : best;
        count++;
      }
      if (!count) break;
      const float less = expf(top - best);
      total *= less;
      for (long d = 0; d < D; d++) out[d] *= less;
      for (long i = 0; i < count; i++) {
        const float share = expf(scores[i] - best);
        total += share;
#pragma omp simd
        for (long d = 0; d < D; d++) out[d] += share * value[seen[i] * D + d];
      }
      top = best;
    }
    for (long d = 0; d < D; d++) out[d] /= total > 0 ? total : 1;
  }
  return 0;
}
