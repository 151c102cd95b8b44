/* Dispatch between the ranks of an expert group. Counts are exchanged once per layer; from the matrix
 * counts[rank][expert] every rank derives all pieces of every round by itself.
 *
 * A round goes in chunks, which are runs of each rank's experts: what is multiplied, and in which order the
 * gradients of an expert add up, does not change with their number. All chunks of a round are given to the
 * side stream before the first is multiplied, and go back one by one. */
#include <string.h>

#include "core/clock.h"
#include "trainer/model/tower.h"

typedef struct shape {
  int64_t E;       /* experts */
  int32_t e, slot; /* ranks of the group, this one */
  const int64_t *counts;
} shape;

static shape shape_of(const train_model *model, const train_moe *moe) {
  const train_env *env = model->env;
  return (shape){moe->experts, env->layout.expert_ranks, env->layout.slot, moe->dispatch.counts};
}

/* The first expert of rank r of the group; of r + 1: the one behind its last. */
static int64_t first_of(const shape *s, int64_t r) {
  return train_experts_first(s->E, r, s->e);
}

/* Rows that all ranks together send to expert j. */
static int64_t expert_total(const shape *s, int64_t j) {
  int64_t total = 0;
  for (int32_t r = 0; r < s->e; r++) total += s->counts[r * s->E + j];
  return total;
}

core_status train_dispatch_make(train_model *model, train_moe *moe, int64_t tokens) {
  train_env *env = model->env;
  train_dispatch_state *d = &moe->dispatch;
  shape s = shape_of(model, moe);
  int64_t *mine = d->counts + s.slot * s.E, bytes[1024];
  core_tensor keep = moe->drops ? train_rows(moe->keep, tokens) : train_none();
  KERN(env, dispatch_plan, train_rows(moe->choice, tokens), keep, s.E, mine, train_rows(moe->slot, tokens),
       moe->index_rows);
  d->sent = 0;
  for (int64_t j = 0; j < s.E; j++) d->sent += mine[j];
  d->rounds = 1;
  if (s.e == 1) return CORE_OK;
  double start = core_clock_now();
  for (int32_t r = 0; r < s.e; r++) bytes[r] = s.E * (int64_t)sizeof *mine;
  TRY(comm_all_gather(env->expert, mine, bytes, d->counts));
  env->seconds[TRAIN_PHASE_EXCHANGE] += core_clock_now() - start;
  for (int32_t r = 0; r < s.e; r++) {
    int64_t total = 0, R = model->limits.expert_rows;
    for (int64_t j = first_of(&s, r); j < first_of(&s, r + 1); j++) total += expert_total(&s, j);
    int64_t rounds = (total + R - 1) / R;
    if (rounds > d->rounds) d->rounds = rounds;
  }
  return CORE_OK;
}

static int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

int64_t train_dispatch_chunks(const train_model *model, const train_moe *moe) {
  int64_t chunks = model->env->settings->parallel.chunks, e = model->env->layout.expert_ranks;
  int64_t most = (moe->experts + e - 1) / e;
  return e == 1 ? 1 : chunks < most ? chunks : most;
}

/* A chunk of a round: of `of` chunks, and of the stream's rows [first, last). */
typedef struct chunk {
  int64_t number, of;
  int64_t first, last;
} chunk;

static chunk chunk_of(const train_model *model, const train_moe *moe, int64_t round, int64_t number) {
  int64_t R = model->limits.expert_rows;
  return (chunk){number, train_dispatch_chunks(model, moe), round * R, round * R + R};
}

/* The first expert of rank r in the chunk; with `more` 1: the one behind its last. */
static int64_t chunk_first(const shape *s, const chunk *c, int32_t r, int64_t more) {
  int64_t first = first_of(s, r), local = first_of(s, r + 1) - first;
  return first + local * (c->number + more) / c->of;
}

void train_dispatch_take(train_model *model, train_moe *moe, int64_t round, int64_t number) {
  train_dispatch_state *d = &moe->dispatch;
  shape s = shape_of(model, moe);
  chunk c = chunk_of(model, moe, round, number);
  if (s.e == 1) c.last = d->sent;
  int64_t own = first_of(&s, s.slot), local = first_of(&s, s.slot + 1) - own, start = 0, at = 0;
  int64_t begin = chunk_first(&s, &c, s.slot, 0), end = chunk_first(&s, &c, s.slot, 1);
  for (int64_t j = own; j < begin; j++) start += expert_total(&s, j);
  start = at = clamp(start, c.first, c.last);
  d->group[0] = 0;
  for (int64_t j = 0, stream = 0; j < local; j++) {
    stream += expert_total(&s, own + j);
    if (own + j >= begin && own + j < end) at = clamp(stream, c.first, c.last);
    d->group[j + 1] = at - start;
  }
  d->first = start - c.first;
  d->rows = at - start;
}

/* Pieces of one chunk between this rank's rows, sorted by expert, and the experts' streams. `width` bytes a
 * row. */
static int32_t pieces_at_sender(const shape *s, const chunk *c, char *rows, int64_t width, comm_piece *out) {
  int64_t own = 0;
  int32_t n = 0;
  for (int32_t r = 0; r < s->e; r++) {
    int64_t stream = 0, begin = chunk_first(s, c, r, 0), end = chunk_first(s, c, r, 1);
    for (int64_t j = first_of(s, r); j < first_of(s, r + 1); j++) {
      int64_t before = 0, count = s->counts[s->slot * s->E + j];
      for (int32_t q = 0; q < s->slot; q++) before += s->counts[q * s->E + j];
      int64_t start = stream + before, lo = clamp(start, c->first, c->last),
              hi = clamp(start + count, c->first, c->last);
      if (hi > lo && j >= begin && j < end)
        out[n++] = (comm_piece){r, rows + (own + lo - start) * width, (hi - lo) * width};
      stream += expert_total(s, j);
      own += count;
    }
  }
  return n;
}

static int32_t pieces_at_expert(const shape *s, const chunk *c, char *rows, int64_t width, comm_piece *out) {
  int64_t stream = 0, begin = chunk_first(s, c, s->slot, 0), end = chunk_first(s, c, s->slot, 1);
  int32_t n = 0;
  for (int64_t j = first_of(s, s->slot); j < end; j++)
    for (int32_t r = 0; r < s->e; r++) {
      int64_t count = s->counts[r * s->E + j], lo = clamp(stream, c->first, c->last),
              hi = clamp(stream + count, c->first, c->last);
      if (hi > lo && j >= begin)
        out[n++] = (comm_piece){r, rows + (lo - c->first) * width, (hi - lo) * width};
      stream += count;
    }
  return n;
}

bool train_dispatch_equal(const train_model *model, const train_moe *moe) {
  const shape s = shape_of(model, moe);
  bool equal = s.E == s.e && s.e > 1 && moe->dispatch.rounds == 1;
  for (int64_t i = 1; i < s.E * s.e && equal; i++) equal = s.counts[i] == s.counts[0];
  return equal;
}

static core_status move(train_model *model, train_moe *moe, chunk c, core_tensor sender, core_tensor expert,
                        bool forward) {
  train_env *env = model->env;
  train_moe_scratch *scratch = &model->moe_scratch;
  const train_dispatch_side *side = &model->side;
  shape s = shape_of(model, moe);
  double start = core_clock_now();
  int64_t width = sender.shape[1] * (int64_t)core_dtype_size(sender.dtype);
  int32_t at_sender = pieces_at_sender(&s, &c, sender.data, width, scratch->send);
  int32_t at_expert = pieces_at_expert(&s, &c, expert.data, width, scratch->recv);
  if (side->stream) {
    TRY(env->ops->device->event_record(side->given, NULL));
    TRY(env->ops->device->event_before(side->stream, side->given));
  }
  if (train_dispatch_equal(model, moe))
    TRY(comm_device_all_to_all(env->expert, forward ? sender.data : expert.data,
                               forward ? expert.data : sender.data, s.counts[0] * width, side->stream));
  else if (forward)
    TRY(comm_device_exchange(env->expert, scratch->send, at_sender, scratch->recv, at_expert, side->stream));
  else
    TRY(comm_device_exchange(env->expert, scratch->recv, at_expert, scratch->send, at_sender, side->stream));
  env->seconds[TRAIN_PHASE_EXCHANGE] += core_clock_now() - start;
  return CORE_OK;
}

/* With one rank in the expert group nothing travels. */
static core_status stays(const train_model *model, core_tensor sender, core_tensor expert, bool *out) {
  *out = model->env->layout.expert_ranks == 1;
  CHECK(!*out || sender.data == expert.data, CORE_ERR_INTERNAL,
        "with one rank sender and expert share their rows");
  return CORE_OK;
}

core_status train_dispatch_send(train_model *model, train_moe *moe, int64_t round, int64_t number,
                                core_tensor from, core_tensor to) {
  const train_dispatch_side *side = &model->side;
  bool done;
  TRY(stays(model, from, to, &done));
  if (done) return CORE_OK;
  TRY(move(model, moe, chunk_of(model, moe, round, number), from, to, true));
  if (side->stream) TRY(model->env->ops->device->event_record(side->arrived[number], side->stream));
  return CORE_OK;
}

core_status train_dispatch_arrived(train_model *model, int64_t number) {
  const train_dispatch_side *side = &model->side;
  if (side->stream) TRY(model->env->ops->device->event_before(NULL, side->arrived[number]));
  return CORE_OK;
}

core_status train_dispatch_return(train_model *model, train_moe *moe, int64_t round, int64_t number,
                                  core_tensor from, core_tensor to) {
  bool done;
  TRY(stays(model, to, from, &done));
  if (!done) TRY(move(model, moe, chunk_of(model, moe, round, number), to, from, false));
  return CORE_OK;
}

core_status train_dispatch_returned(train_model *model) {
  const train_dispatch_side *side = &model->side;
  const core_device *device = model->env->ops->device;
  if (!side->stream) return CORE_OK;
  TRY(device->event_record(side->returned, side->stream));
  TRY(device->event_before(NULL, side->returned));
  return CORE_OK;
}

core_status train_dispatch_prepare(train_model *model) {
  const train_env *env = model->env;
  const core_device *device = env->ops->device;
  train_dispatch_side *side = &model->side;
  int64_t chunks = env->settings->parallel.chunks;
  if (device->host_access || chunks == 1 || env->layout.expert_ranks == 1 || model->moe_layers == 0)
    return CORE_OK;
  TRY(device->stream_create(&side->stream));
  TRY(device->event_create(&side->given));
  TRY(device->event_create(&side->returned));
  for (int64_t i = 0; i < chunks; i++) TRY(device->event_create(&side->arrived[i]));
  return CORE_OK;
}

void train_dispatch_free(train_model *model) {
  train_dispatch_side *side = &model->side;
  if (!side->stream) return;
  const core_device *device = model->env->ops->device;
  if (side->given) device->event_destroy(side->given);
  if (side->returned) device->event_destroy(side->returned);
  for (int i = 0; i < TRAIN_MOST_CHUNKS; i++)
    if (side->arrived[i]) device->event_destroy(side->arrived[i]);
  device->stream_destroy(side->stream);
  memset(side, 0, sizeof *side);
}
