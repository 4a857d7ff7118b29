/* A whole FFN, inside a parallel region. */
#pragma once
#include "products.h"

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
  int across;               /* down lies as a linear layer has it, [D, count]: then `count` is in whole vectors, the
                               weights are floats, and there is no branch and no threshold */
  const float *bias;        /* of gate and then of up, of all neurons there are, or NULL */
  const uint8_t *keep;      /* a byte a neuron [B, count], or NULL */
  const float *threshold;   /* one an input, `apart` places apart: of what |act(gate)| is below it, up and down are not
                               read; or NULL */
  const float *last;        /* [D], or NULL */
  long width;               /* all neurons there are */
} ffn;

/* whole vectors, an odd number: what lies a power of two apart shares a place in the cache */
static long padded(long count) { return ((count + LANES - 1) / LANES | 1) * LANES; }

/* floats from what one input has of neurons to the next */
static long ffn_step(const ffn *f) { return f->across ? f->count : padded(f->count); }

/* what a thread needs of memory, in floats, beside its sum: shared by all */
static long ffn_room(const ffn *f, long B) {
  long step = ffn_step(f);
  return 2 * B * step + B * f->rank + (f->threshold ? step : 0);
}

/* this thread's part of the sum for inputs [B, D], added to own [B, D] */
static void ffn_part(const ffn *f, const inputs *in, float *room, float *own, long B) {
  long step = ffn_step(f), from, to, D = f->gate.columns;
  float *a = room, *z = a + B * step, *inner = z + B * step;
  const int32_t *rows = f->gate.rows;
  own_part(f->count, LANES, &from, &to);
  if (from < to) {
    for (long b = 0; b < B; b++) memset(a + b * step + to, 0, sizeof(float) * (-to & (LANES - 1)));
    many_dots(&f->gate, from, to, in, a + from, step, B);
    if (f->gated && !f->threshold) many_dots(&f->up, from, to, in, z + from, step, B);
  }
  MARK(GATE_UP);
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
    inputs alone = from_input(in, b);
    if (f->gated) many_dots(&up, 0, many, &alone, own_z + from, step, 1);
    for (long i = 0; i < many; i++)
      own_z[from + i] = own_a[from + i] * (f->gated ? own_z[from + i] + (up_bias ? up_bias[row[i]] : 0) : 1);
    many_adds(&down, 0, many, f->type, own_z + from, step, own + b * D, 1);
  }
  MARK(ACT);
  if (f->across) { /* each its outputs, of all neurons */
#pragma omp barrier
    inputs mid = {.x = z, .bits = f->down.bits, .columns = f->count};
    own_part(D, AT_ONCE, &from, &to);
    many_dots(&f->down, from, to, &mid, own + from, D, B);
    MARK(DOWN);
    return;
  }
  if (!f->threshold) many_adds(&f->down, from, to, f->type, z + from, step, own, B);
  MARK(DOWN);
  own_part(f->rank, 1, &from, &to);
  many_dots(&f->left, from, to, in, inner + from, f->rank, B);
  many_adds(&f->right, from, to, f->type, inner + from, f->rank, own, B);
  MARK(BRANCH);
}
