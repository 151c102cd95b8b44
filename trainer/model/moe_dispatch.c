/* Dispatch between the ranks of an expert group. Counts are exchanged once per layer; from the matrix
 * counts[rank][expert] every rank derives all pieces of every round by itself. */
#include <string.h>

#include "core/clock.h"
#include "trainer/model/tower.h"

typedef struct shape {
  int64_t E, local; /* experts, experts of a rank */
  int32_t e, slot;  /* ranks of the group, this one */
  const int64_t *counts;
} shape;

static shape shape_of(const train_model *model, const train_moe *moe) {
  const train_env *env = model->env;
  int64_t E = env->settings->model.moe.experts;
  return (shape){E, E / env->layout.expert_ranks, env->layout.expert_ranks, env->layout.slot,
                 moe->dispatch.counts};
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
    for (int64_t j = r * s.local; j < (r + 1) * s.local; j++) total += expert_total(&s, j);
    int64_t rounds = (total + R - 1) / R;
    if (rounds > d->rounds) d->rounds = rounds;
  }
  return CORE_OK;
}

static int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

void train_dispatch_round(train_model *model, train_moe *moe, int64_t round) {
  train_dispatch_state *d = &moe->dispatch;
  shape s = shape_of(model, moe);
  int64_t first = round * model->limits.expert_rows, last = first + model->limits.expert_rows, at = 0;
  if (s.e == 1) last = d->sent;
  d->group[0] = 0;
  for (int64_t j = 0; j < s.local; j++) {
    at += expert_total(&s, s.slot * s.local + j);
    d->group[j + 1] = clamp(at, first, last) - first;
  }
  d->rows = d->group[s.local];
}

/* Pieces of one round between this rank's rows, sorted by expert, and the experts' streams. `width` bytes a
 * row. */
static int32_t pieces_at_sender(const train_model *model, const shape *s, int64_t round, char *rows,
                                int64_t width, comm_piece *out) {
  int64_t first = round * model->limits.expert_rows, last = first + model->limits.expert_rows, own = 0;
  int32_t n = 0;
  for (int32_t r = 0; r < s->e; r++) {
    int64_t stream = 0;
    for (int64_t j = r * s->local; j < (r + 1) * s->local; j++) {
      int64_t before = 0, count = s->counts[s->slot * s->E + j];
      for (int32_t q = 0; q < s->slot; q++) before += s->counts[q * s->E + j];
      int64_t start = stream + before, lo = clamp(start, first, last), hi = clamp(start + count, first, last);
      if (hi > lo) out[n++] = (comm_piece){r, rows + (own + lo - start) * width, (hi - lo) * width};
      stream += expert_total(s, j);
      own += count;
    }
  }
  return n;
}

static int32_t pieces_at_expert(const train_model *model, const shape *s, int64_t round, char *rows,
                                int64_t width, comm_piece *out) {
  int64_t first = round * model->limits.expert_rows, last = first + model->limits.expert_rows, stream = 0;
  int32_t n = 0;
  for (int64_t j = s->slot * s->local; j < (s->slot + 1) * s->local; j++)
    for (int32_t r = 0; r < s->e; r++) {
      int64_t count = s->counts[r * s->E + j], lo = clamp(stream, first, last),
              hi = clamp(stream + count, first, last);
      if (hi > lo) out[n++] = (comm_piece){r, rows + (lo - first) * width, (hi - lo) * width};
      stream += count;
    }
  return n;
}

static core_status move(train_model *model, train_moe *moe, int64_t round, core_tensor sender,
                        core_tensor expert, bool forward) {
  train_env *env = model->env;
  train_moe_scratch *scratch = &model->moe_scratch;
  shape s = shape_of(model, moe);
  if (s.e == 1) {
    CHECK(sender.data == expert.data, CORE_ERR_INTERNAL, "with one rank sender and expert share their rows");
    return CORE_OK;
  }
  double start = core_clock_now();
  int64_t width = sender.shape[1] * (int64_t)core_dtype_size(sender.dtype);
  int32_t at_sender = pieces_at_sender(model, &s, round, sender.data, width, scratch->send);
  int32_t at_expert = pieces_at_expert(model, &s, round, expert.data, width, scratch->recv);
  if (forward)
    TRY(comm_device_exchange(env->expert, scratch->send, at_sender, scratch->recv, at_expert, NULL));
  else
    TRY(comm_device_exchange(env->expert, scratch->recv, at_expert, scratch->send, at_sender, NULL));
  env->seconds[TRAIN_PHASE_EXCHANGE] += core_clock_now() - start;
  return CORE_OK;
}

core_status train_dispatch_send(train_model *model, train_moe *moe, int64_t round, core_tensor from,
                                core_tensor to) {
  TRY(move(model, moe, round, from, to, true));
  return CORE_OK;
}

core_status train_dispatch_return(train_model *model, train_moe *moe, int64_t round, core_tensor from,
                                  core_tensor to) {
  TRY(move(model, moe, round, to, from, false));
  return CORE_OK;
}
