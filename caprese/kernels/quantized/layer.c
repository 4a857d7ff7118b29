/* A decoder layer of the Llama kind for one more token of a few sequences: norm, attention, norm, FFN. */
#include "ffn.h"

typedef struct {
  weight q, k, v, o;
  const float *q_bias, *k_bias, *v_bias, *o_bias; /* or NULL */
  const float *norm, *ffn_norm;                   /* [D] */
  long heads, kv_heads, size;                     /* `size` of a head */
  float eps, ffn_eps, scaling;
  int type; /* of inputs, outputs, keys and values */
} layer;

typedef struct {
  char *start;
  long sequence, head, token; /* elements from one to the next */
} states;

static float element(const void *x, int type, long i) {
  return type == 32 ? ((const float *)x)[i] : widen(((const uint16_t *)x)[i]);
}

inline floats part(const void *x, int type, long i) {
  return type == 32 ? *(const floats *)((const float *)x + i) : widened((const uint16_t *)x + i);
}

/* root mean square norm of x [B, D] */
static void normed(const void *x, int type, const float *by, float eps, float *out, long D, long B) {
  for (long b = 0; b < B; b++) {
    floats squares = {0};
    float rest = 0, *own = out + b * D;
    long i = 0;
    for (; i + LANES <= D; i += LANES) {
      floats values = part(x, type, b * D + i);
      *(floats *)(own + i) = values, squares += values * values;
    }
    for (; i < D; i++) own[i] = element(x, type, b * D + i), rest += own[i] * own[i];
    float factor = 1 / sqrtf((sum(squares) + rest) / D + eps);
    for (i = 0; i + LANES <= D; i += LANES) *(floats *)(own + i) *= factor * *(const floats *)(by + i);
    for (; i < D; i++) own[i] *= factor * by[i];
  }
}

/* those of the places from..to that are the weight's own, which start at `at` of `total` outputs */
static void projected(const weight *w, long rows, long at, long from, long to, const inputs *in, float *out, long total,
                      long B) {
  long low = from > at ? from - at : 0, high = to - at < rows ? to - at : rows;
  if (low < high) many_dots(w, low, high, in, out + at + low, total, B);
}

/* x [B, D] -> q [B, heads, size], and k and v [B, kv_heads, size] as token `place` of what there is; q and k turned by cos
   and sin [size], those of a sequence `apart` places from the next's. Returns 0, or 1 where there is no memory. */
int caprese_layer_begin(const layer *at, const void *x, const void *cos, const void *sin, long apart, void *q,
                        const states *k, const states *v, long place, long B) {
  int threads = omp_get_max_threads();
  long D = at->q.columns, d = at->size, heads = at->heads, kv = at->kv_heads, all = heads + 2 * kv, total = all * d;
  long each = B * D + inputs_room(D, B);
  float *room = malloc(sizeof(float) * (threads * each + B * total)), *h = room + threads * each;
  if (!room) return 1;
#pragma omp parallel num_threads(threads)
  {
    float *own = room + omp_get_thread_num() * each; /* each its own: less than waiting for one another */
    long from, to;
    normed(x, at->type, at->norm, at->eps, own, D, B);
    inputs in = prepare(at->q.bits, at->type, own, D, B, own + B * D);
    own_part(total, AT_ONCE, &from, &to);
    projected(&at->q, heads * d, 0, from, to, &in, h, total, B);
    projected(&at->k, kv * d, heads * d, from, to, &in, h, total, B);
    projected(&at->v, kv * d, (heads + kv) * d, from, to, &in, h, total, B);
#pragma omp barrier
#pragma omp for schedule(static)
    for (long i = 0; i < B * all; i++) {
      long b = i / all, head = i % all, own = head < heads ? head : (head - heads) % kv;
      int which = head < heads ? 0 : head < heads + kv ? 1 : 2;
      const float *bias = which == 0 ? at->q_bias : which == 1 ? at->k_bias : at->v_bias;
      const states *new = which == 1 ? k : v;
      void *out = which == 0 ? q : new->start;
      float *values = h + b * total + head * d;
      long to_row = which == 0 ? (b * heads + own) * d : b * new->sequence + own * new->head + place * new->token;
      for (long j = 0; bias && j < d; j++) values[j] += bias[own * d + j];
      for (long j = 0; j < d; j++) {
        float value = values[j];
        if (which < 2) {
          float other = j < d / 2 ? -values[j + d / 2] : values[j - d / 2];
          value = value * element(cos, at->type, b * apart + j) + other * element(sin, at->type, b * apart + j);
        }
        write_out(out, at->type, to_row + j, value);
      }
    }
  }
  free(room);
  return 0;
}

/* attention of one head over S tokens, of which `mask` leaves some; scores: room for S, in whole vectors; `whole` is how
   many vectors a head has, so that what is constant stays in registers */
inline void attend(int type, int whole, const float *q, const char *keys, long key_step, const char *values,
                   long value_step, long S, const uint8_t *mask, float scaling, long d, float *scores, float *out) {
  float most = -INFINITY;
  long bytes = type / 8, vectors = whole ? whole : d / LANES;
  for (long s = 0; s < S; s++) {
    floats total = {0};
    const char *key = keys + s * key_step * bytes;
    for (long i = 0; i < vectors; i++) total += *(const floats *)(q + i * LANES) * part(key, type, i * LANES);
    float all = sum(total);
    for (long i = vectors * LANES; i < d; i++) all += q[i] * element(key, type, i);
    scores[s] = mask && !mask[s] ? -INFINITY : scaling * all;
    if (scores[s] > most) most = scores[s];
  }
  if (most == -INFINITY) { /* it sees nothing */
    memset(out, 0, sizeof(float) * d);
    return;
  }
  for (long s = S; s % LANES; s++) scores[s] = -INFINITY;
  floats sums = {0}, mixed[16] = {0};
  for (long s = 0; s < S; s += LANES) {
    floats *own = (floats *)(scores + s), x = *own - most, e = exponential(x);
    for (int i = 0; i < LANES; i++) e[i] = x[i] < -80 ? 0 : e[i];
    *own = e, sums += e;
  }
  float total = 1 / sum(sums);
  if (whole) {
    for (long s = 0; s < S; s++)
      for (long i = 0; i < whole; i++)
        mixed[i] += scores[s] * part(values + s * value_step * bytes, type, i * LANES);
    for (long i = 0; i < whole; i++) *(floats *)(out + i * LANES) = total * mixed[i];
    return;
  }
  for (long i = 0; i < d; i++) out[i] = 0;
  for (long s = 0; s < S; s++)
    for (long i = 0; i < d; i++) out[i] += scores[s] * total * element(values + s * value_step * bytes, type, i);
}

static void attend_any(int type, const float *q, const char *keys, long key_step, const char *values, long value_step,
                       long S, const uint8_t *mask, float scaling, long d, float *scores, float *out) {
#define ATTEND(type, whole) \
  attend(type, whole, q, keys, key_step, values, value_step, S, mask, scaling, d, scores, out)
  if (type == 32 && d == 64) ATTEND(32, 4);
  else if (type == 32 && d == 128) ATTEND(32, 8);
  else if (type == 16 && d == 64) ATTEND(16, 4);
  else if (type == 16 && d == 128) ATTEND(16, 8);
  else ATTEND(type, 0);
#undef ATTEND
}

/* The rest: q [B, heads, size] and all keys and values -> y [B, D], the layer's output for x [B, D]. mask: a byte a token
   [B, S], those of a sequence `apart` bytes from the next's, or NULL. Without an FFN (NULL) y is what it would see, not
   normed. Returns as above. */
int caprese_layer_end(const layer *at, const ffn *f, const void *x, const void *q, const states *keys,
                      const states *values, long S, const uint8_t *mask, long apart, void *y, long B) {
  int threads = omp_get_max_threads(), type = at->type;
  long D = at->q.columns, d = at->size, heads = at->heads, width = heads * d, room_S = (S + LANES) / LANES * LANES;
  long each = inputs_room(D > width ? D : width, B);
  float *parts = malloc(sizeof(float) * (2 * threads * B * D + threads * (room_S + d + each) + B * width + B * D +
                                         (f ? ffn_room(f, B) : 0)));
  if (!parts) return 1;
  float *norms = parts + threads * B * D, *scores = norms + threads * B * D, *mixed = scores + threads * (room_S + d + each);
  float *hidden = mixed + B * width, *room = hidden + B * D;
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num();
    float *own = parts + me * B * D, *in = norms + me * B * D, *score = scores + me * (room_S + d + each);
    float *planes = score + room_S + d;
    long from, to;
#pragma omp for schedule(static)
    for (long i = 0; i < B * heads; i++) {
      long b = i / heads, head = i % heads, kv = head / (heads / at->kv_heads);
      float *query = score + room_S;
      for (long j = 0; j < d; j++) query[j] = element(q, type, i * d + j);
      attend_any(type, query, keys->start + (b * keys->sequence + kv * keys->head) * type / 8,
                 keys->token,
                 values->start + (b * values->sequence + kv * values->head) * type / 8,
                 values->token, S,
                 mask ? mask + b * apart : NULL, at->scaling, d, score, mixed + i * d);
    }
    own_part(D, AT_ONCE, &from, &to);
    inputs mix = prepare(at->o.bits, type, mixed, width, B, planes);
    many_dots(&at->o, from, to, &mix, hidden + from, D, B);
    for (long b = 0; b < B; b++)
      for (long i = from; i < to; i++) {
        float value = hidden[b * D + i] + (at->o_bias ? at->o_bias[i] : 0);
        value = (type == 32 ? value : widen(narrow(value))) + element(x, type, b * D + i);
        hidden[b * D + i] = type == 32 ? value : widen(narrow(value));
      }
    memset(own, 0, sizeof(float) * B * D);
#pragma omp barrier
    if (f) {
      normed(hidden, 32, at->ffn_norm, at->ffn_eps, in, D, B);
      inputs seen = prepare(f->gate.bits, type, in, D, B, planes);
      ffn_part(f, &seen, room, own, B);
    }
#pragma omp barrier
    reduce(parts, hidden, f ? f->last : NULL, y, type, D, B);
  }
  free(parts);
  return 0;
}

typedef struct {
  const layer *at;
  const ffn *inside;
  states keys, values;
} one;

/* `count` layers, one after the other: x [B, D] -> y [B, D], with S tokens in each cache, of which the last is written */
int caprese_layers(const one *each, long count, const void *x, const void *cos, const void *sin, long turns, long S,
                   const uint8_t *mask, long apart, void *y, long B) {
  const layer *at = each->at;
  void *q = malloc(sizeof(float) * B * at->heads * at->size);
  int failed = !q;
  for (long i = 0; i < count && !failed; i++, x = y) {
    const one *now = each + i;
    failed = caprese_layer_begin(now->at, x, cos, sin, turns, q, &now->keys, &now->values, S - 1, B) ||
             caprese_layer_end(now->at, now->inside, x, q, &now->keys, &now->values, S, mask, apart, y, B);
  }
  free(q);
  return failed;
}
