/* One token of a mixer, of every sequence: the convolution, and the recurrence with what is read of its state. */
#include <math.h>

/* fewer numbers than these are done before other threads are there */
#define FEW 16384

/* y [B, C] = the sum over k of x [B, K, C] with weight [C, K], and bias [C], or NULL; SiLU of it if `silu` */
int caprese_convolve(const float *x, const float *weight, const float *bias, float *y, long B, long K, long C,
                     int silu) {
#pragma omp parallel for if (B * K * C > FEW)
  for (long b = 0; b < B; b++) {
    const float *in = x + b * K * C;
    float *out = y + b * C;
    for (long c = 0; c < C; c++) out[c] = bias ? bias[c] : 0;
    for (long k = 0; k < K; k++)
      for (long c = 0; c < C; c++) out[c] += in[k * C + c] * weight[c * K + k];
    if (silu)
      for (long c = 0; c < C; c++) out[c] /= 1 + expf(-out[c]);
  }
  return 0;
}

/* state [B, H, P, N] goes on by one token, x [B, H, P], dt [B, H], b and c [B, H, N]; y [B, H, P] is what c reads */
int caprese_step(const float *x, const float *dt, const float *rates, const float *b, const float *c, float *state,
                 float *y, long B, long H, long P, long N) {
#pragma omp parallel for if (B * H * P * N > FEW)
  for (long at = 0; at < B * H; at++) {
    const float step = dt[at], decay = expf(step * rates[at % H]);
    const float *in = b + at * N, *out = c + at * N;
    for (long p = 0; p < P; p++) {
      float *own = state + (at * P + p) * N, read = 0;
      const float given = step * x[at * P + p];
#pragma omp simd reduction(+ : read)
      for (long n = 0; n < N; n++) {
        own[n] = decay * own[n] + given * in[n];
        read += own[n] * out[n];
      }
      y[at * P + p] = read;
    }
  }
  return 0;
}
