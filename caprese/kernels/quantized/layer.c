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

/* One more token of B sequences, as a layer sees it; or `span` of each, one after the other. */
typedef struct {
  const void *x;        /* [B, D] */
  const void *cos, *sin; /* [size], those of a sequence `turns` places from the next's */
  long turns, B, span;
  void *q, *y;          /* [B, heads, size], [B, D] */
  long place, S;        /* of the first token's keys and values, and how many tokens there are */
  const uint8_t *mask;  /* a byte a token [B, S], those of a sequence `apart` bytes from the next's, or NULL */
  long apart;
} token;

static long begin_each(const layer *at, long B) { return B * at->q.columns + inputs_room(at->q.columns, B); }

static long begin_room(const layer *at, long B, int threads) {
  return threads * begin_each(at, B) + B * (at->heads + 2 * at->kv_heads) * at->size;
}

/* x -> q, and k and v as token `place` of what there is; q and k turned. Inside a parallel region, as what follows. */
static void begin(const layer *at, const token *now, const states *k, const states *v, float *room) {
  long D = at->q.columns, d = at->size, heads = at->heads, kv = at->kv_heads, all = heads + 2 * kv, total = all * d;
  long B = now->B, each = begin_each(at, B), from, to;
  float *h = room + omp_get_num_threads() * each;
  float *own = room + omp_get_thread_num() * each; /* each its own: less than waiting for one another */
  normed(now->x, at->type, at->norm, at->eps, own, D, B);
  inputs in = prepare(at->q.bits, at->type, own, D, B, own + B * D);
  own_part(total, AT_ONCE, &from, &to);
  MARK(NORM);
  projected(&at->q, heads * d, 0, from, to, &in, h, total, B);
  projected(&at->k, kv * d, heads * d, from, to, &in, h, total, B);
  projected(&at->v, kv * d, (heads + kv) * d, from, to, &in, h, total, B);
  MARK(QKV);
#pragma omp barrier
  MARK(WAIT);
#pragma omp for schedule(static)
  for (long i = 0; i < B * all; i++) {
    long b = i / all, head = i % all, own = head < heads ? head : (head - heads) % kv;
    int which = head < heads ? 0 : head < heads + kv ? 1 : 2;
    const float *bias = which == 0 ? at->q_bias : which == 1 ? at->k_bias : at->v_bias;
    const states *new = which == 1 ? k : v;
    void *out = which == 0 ? now->q : new->start;
    float *values = h + b * total + head * d;
    long place = now->place + b % now->span;
    long to_row = which == 0 ? (b * heads + own) * d
                             : b / now->span * new->sequence + own * new->head + place * new->token;
    for (long j = 0; bias && j < d; j++) values[j] += bias[own * d + j];
    for (long j = 0; j < d; j++) {
      float value = values[j];
      if (which < 2) {
        float other = j < d / 2 ? -values[j + d / 2] : values[j - d / 2];
        long at_turn = b * now->turns + j;
        value = value * element(now->cos, at->type, at_turn) + other * element(now->sin, at->type, at_turn);
      }
      write_out(out, at->type, to_row + j, value);
    }
  }
  MARK(TURN);
}

/* begin, of one layer. Returns 0, or 1 where there is no memory. */
int caprese_layer_begin(const layer *at, const void *x, const void *cos, const void *sin, long apart, void *q,
                        const states *k, const states *v, long place, long B) {
  int threads = omp_get_max_threads();
  float *room = malloc(sizeof(float) * begin_room(at, B, threads));
  if (!room) return 1;
  token now = {.x = x, .cos = cos, .sin = sin, .turns = apart, .q = q, .place = place, .B = B, .span = 1};
#pragma omp parallel num_threads(threads)
  begin(at, &now, k, v, room);
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

static long end_each(const layer *at, long S, long B) {
  long D = at->q.columns, width = at->heads * at->size;
  return 2 * B * D + (S + LANES) / LANES * LANES + at->size + inputs_room(D > width ? D : width, B);
}

static long end_room(const layer *at, const ffn *f, long S, long B, int threads) {
  return threads * end_each(at, S, B) + B * at->heads * at->size + B * at->q.columns + (f ? ffn_room(f, B) : 0);
}

/* The rest: q and all keys and values -> y [B, D], the layer's output for x. Without an FFN (NULL) y is what it would see,
   not normed. */
static void end(const layer *at, const ffn *f, const token *now, const states *keys, const states *values, float *room) {
  int threads = omp_get_num_threads(), me = omp_get_thread_num(), type = at->type;
  long D = at->q.columns, d = at->size, heads = at->heads, width = heads * d, B = now->B, S = now->S, from, to;
  float *parts = room, *norms = parts + threads * B * D, *rest = norms + threads * B * D;
  long each = end_each(at, S, B) - 2 * B * D;
  float *mixed = rest + threads * each, *hidden = mixed + B * width, *inner = hidden + B * D;
  float *own = parts + me * B * D, *in = norms + me * B * D, *query = rest + me * each, *score = query + d;
  float *planes = score + (S + LANES) / LANES * LANES;
#pragma omp for schedule(static)
  for (long i = 0; i < B * heads; i++) {
    long b = i / heads, head = i % heads, kv = head / (heads / at->kv_heads);
    for (long j = 0; j < d; j++) query[j] = element(now->q, type, i * d + j);
    long one = b / now->span, seen = S - now->span + 1 + b % now->span; /* a token sees those up to itself */
    attend_any(type, query, keys->start + (one * keys->sequence + kv * keys->head) * type / 8, keys->token,
               values->start + (one * values->sequence + kv * values->head) * type / 8, values->token, seen,
               now->mask ? now->mask + one * now->apart : NULL, at->scaling, d, score, mixed + i * d);
  }
  MARK(ATTEND);
  own_part(D, AT_ONCE, &from, &to);
  inputs mix = prepare(at->o.bits, type, mixed, width, B, planes);
  many_dots(&at->o, from, to, &mix, hidden + from, D, B);
  for (long b = 0; b < B; b++)
    for (long i = from; i < to; i++) {
      float value = hidden[b * D + i] + (at->o_bias ? at->o_bias[i] : 0);
      value = (type == 32 ? value : widen(narrow(value))) + element(now->x, type, b * D + i);
      hidden[b * D + i] = type == 32 ? value : widen(narrow(value));
    }
  memset(own, 0, sizeof(float) * B * D);
  MARK(OUT);
#pragma omp barrier
  MARK(WAIT);
  if (f) {
    normed(hidden, 32, at->ffn_norm, at->ffn_eps, in, D, B);
    inputs seen = prepare(f->gate.bits, type, in, D, B, planes);
    MARK(NORM);
    ffn_part(f, &seen, inner, own, B);
  }
#pragma omp barrier
  MARK(WAIT);
  reduce(parts, hidden, f ? f->last : NULL, now->y, type, D, B);
  MARK(REDUCE);
}

/* end, of one layer. Returns as above. */
int caprese_layer_end(const layer *at, const ffn *f, const void *x, const void *q, const states *keys,
                      const states *values, long S, const uint8_t *mask, long apart, void *y, long B) {
  int threads = omp_get_max_threads();
  float *room = malloc(sizeof(float) * end_room(at, f, S, B, threads));
  if (!room) return 1;
  token now = {.x = x, .q = (void *)q, .y = y, .S = S, .mask = mask, .apart = apart, .B = B, .span = 1};
#pragma omp parallel num_threads(threads)
  end(at, f, &now, keys, values, room);
  free(room);
  return 0;
}

typedef struct {
  const layer *at;
  const ffn *inside;
  states keys, values;
} one;

/* `count` layers of one shape, one after the other, with S tokens in each cache, of which the last `span` are written, and
   the norm behind them: x [B, D] -> y [B, D], B counting the tokens of a sequence one after the other. One parallel region: threads that meet again within microseconds wait awake.
   Returns as above. */
int caprese_layers(const one *each, long count, const float *norm, float eps, const void *x, const void *cos,
                   const void *sin, long turns, long S, const uint8_t *mask, long apart, void *y, long B, long span) {
  const layer *at = each->at;
  int threads = omp_get_max_threads();
  long D = at->q.columns, queries = B * at->heads * at->size, most = begin_room(at, B, threads);
  for (long i = 0; i < count; i++) {
    long own = end_room(each[i].at, each[i].inside, S, B, threads);
    most = own > most ? own : most;
  }
  float *room = malloc(sizeof(float) * (most + queries + B * D)), *last = room + most + queries;
  if (!room) return 1;
  token now = {x, cos, sin, turns, B, span, room + most, y, S - span, S, mask, apart};
  START;
#pragma omp parallel num_threads(threads) firstprivate(now)
  {
    MARK(WAIT);
    for (long i = 0; i < count; i++, now.x = now.y) {
      begin(each[i].at, &now, &each[i].keys, &each[i].values, room);
      end(each[i].at, each[i].inside, &now, &each[i].keys, &each[i].values, room);
    }
  }
  MARK(WAIT);
  normed(y, at->type, norm, eps, last, D, B);
  for (long i = 0; i < B * D; i++) write_out(y, at->type, i, last[i]);
  MARK(NORM);
  free(room);
  return 0;
}
