/* Outline: every rank gets all embeddings; each computes, for its own rows, the softmax denominators of every
 * direction they take part in; the denominators go round; then each rank has all it needs for the exact
 * gradient of its own rows and nothing has to be summed. Logits exist one block of rows at a time. */
#include <math.h>
#include <string.h>

#include "trainer/objective/objective.h"
#include "trainer/share_rows.h"

core_status train_contrastive_make(train_env *env, int64_t width, train_contrastive *out) {
  const train_settings *s = env->settings;
  memset(out, 0, sizeof *out);
  out->env = env;
  out->B = env->layout.batch;
  out->Z = width;
  out->block = out->B < 256 ? out->B : 256;
  for (unsigned i = 0; i < s->objective.pairs_count; i++, out->pairs++) {
    int32_t pair[2] = {0, 0};
    CHECK(train_settings_pair(s, s->objective.pairs[i], pair), CORE_ERR_CONFIG,
          "'%s' is not a pair of modalities", s->objective.pairs[i]);
    out->first[i] = pair[0];
    out->second[i] = pair[1];
  }
  for (int32_t a = 0; s->objective.pairs_count == 0 && a < env->layout.modalities; a++)
    for (int32_t b = a + 1; b < env->layout.modalities; b++) {
      out->first[out->pairs] = a;
      out->second[out->pairs++] = b;
    }
  out->averaged = out->pairs;
  out->factor = 1;
  return CORE_OK;
}

core_status train_contrastive_plan(train_contrastive *loss, const train_arenas *arenas) {
  core_arena *arena = arenas->objective;
  int64_t pieces = train_share_pieces(&loss->env->layout), B = loss->B, pairs = loss->pairs;
  for (int32_t m = 0; m < loss->env->layout.modalities; m++) {
    TRY(train_take(arena, CORE_REAL_DTYPE, B, loss->Z, &loss->z[m]));
    TRY(train_take(arena, CORE_REAL_DTYPE, B, loss->Z, &loss->gradient[m]));
  }
  TRY(train_mirror_plan(arenas, arena, CORE_REAL_DTYPE, 2 * pairs, B, &loss->lse));
  TRY(train_mirror_plan(arenas, arena, CORE_REAL_DTYPE, 2 * pairs, B, &loss->positive));
  TRY(train_take(arena, CORE_REAL_DTYPE, loss->block, B, &loss->cosine));
  TRY(train_mirror_plan(arenas, arena, CORE_UINT8, pairs, B, &loss->valid));
  TRY(train_mirror_plan(arenas, arena, CORE_INT32, B, 1, &loss->label));
  TRY(train_mirror_plan(arenas, arena, CORE_UINT64, B, 1, &loss->id));
  TRY(train_mirror_plan(arenas, arena, CORE_FLOAT64, 1, 1, &loss->d_scale));
  TRY(ARENA_TAKE(arenas->host, pieces, &loss->send));
  TRY(ARENA_TAKE(arenas->host, pieces, &loss->recv));
  return CORE_OK;
}

/* Rows of this rank's samples of micro-batch `micro` in a [B, Z]; none where the modality is not held. */
static core_tensor own_rows(const train_contrastive *loss, core_tensor all, int32_t m, int64_t micro) {
  data_range range = train_layout_range(&loss->env->layout, loss->env->layout.rank, m, micro);
  return train_slice(all, range.lo, range.hi - range.lo);
}

core_status train_contrastive_put_rows(train_contrastive *loss, int32_t m, int64_t micro, core_tensor rows) {
  core_tensor own = own_rows(loss, loss->z[m], m, micro);
  if (core_tensor_bytes(&own) > 0)
    TRY(loss->env->ops->device->copy(own.data, rows.data, core_tensor_bytes(&own), NULL));
  return CORE_OK;
}

core_status train_contrastive_get_rows(const train_contrastive *loss, int32_t m, int64_t micro,
                                       core_tensor rows) {
  core_tensor own = own_rows(loss, loss->gradient[m], m, micro);
  if (core_tensor_bytes(&own) > 0)
    TRY(loss->env->ops->device->copy(rows.data, own.data, core_tensor_bytes(&own), NULL));
  return CORE_OK;
}

core_status train_contrastive_put(train_contrastive *loss, const train_model *model, int64_t micro) {
  for (int32_t m = 0; m < loss->env->layout.modalities; m++)
    TRY(train_contrastive_put_rows(loss, m, micro, model->head[m].z));
  return CORE_OK;
}

core_status train_contrastive_get(const train_contrastive *loss, train_model *model, int64_t micro) {
  for (int32_t m = 0; m < loss->env->layout.modalities; m++)
    TRY(train_contrastive_get_rows(loss, m, micro, model->head[m].gradient));
  return CORE_OK;
}

/* A block of own rows of one direction of one pair. */
typedef struct rows {
  int32_t pair, direction; /* 0: first -> second */
  int32_t query, key;      /* modalities */
  int64_t lo, n;
} rows;

/* Entries [lo, lo + n) of row `row` of a matrix, as a vector. */
static core_tensor part(core_tensor matrix, int64_t row, int64_t lo, int64_t n) {
  core_tensor line = core_tensor_1(matrix.data, matrix.dtype, core_tensor_count(&matrix));
  return train_slice(line, row * matrix.shape[1] + lo, n);
}

static int32_t line_of(const rows *r, int32_t direction) {
  return 2 * r->pair + direction;
}

static kern_contrastive describe(const train_contrastive *loss, const rows *r, double scale) {
  return (kern_contrastive){.scale = scale,
                            .first = r->lo,
                            .valid = part(loss->valid.device, r->pair, 0, loss->B),
                            .label = loss->label.device,
                            .id = loss->id.device};
}

static core_tensor cosine_rows(const train_contrastive *loss, const rows *r) {
  return train_rows(loss->cosine, r->n);
}

static core_status cosines(train_contrastive *loss, const rows *r) {
  KERN(loss->env, gemm, KERN_NT, train_slice(loss->z[r->query], r->lo, r->n), loss->z[r->key], KERN_SET,
       cosine_rows(loss, r));
  return CORE_OK;
}

static core_status denominators(train_contrastive *loss, const rows *r, double scale) {
  kern_contrastive op = describe(loss, r, scale);
  int32_t line = line_of(r, r->direction);
  TRY(cosines(loss, r));
  KERN(loss->env, contrastive_fwd, &op, cosine_rows(loss, r), part(loss->lse.device, line, r->lo, r->n),
       part(loss->positive.device, line, r->lo, r->n));
  return CORE_OK;
}

/* On the host, in one order. */
static core_status add_losses(train_contrastive *loss, const rows *r, double scale) {
  (void)scale;
  int64_t first = line_of(r, r->direction) * loss->B + r->lo;
  const core_real *lse = (core_real *)loss->lse.host + first;
  const core_real *positive = (core_real *)loss->positive.host + first;
  for (int64_t i = 0; i < r->n; i++) loss->loss[r->pair] += 0.5 * ((double)lse[i] - (double)positive[i]);
  return CORE_OK;
}

static core_status gradients(train_contrastive *loss, const rows *r, double scale) {
  if (loss->count[r->pair] == 0) return CORE_OK;
  kern_contrastive op = describe(loss, r, scale);
  double weight = 0.5 * loss->factor / ((double)loss->count[r->pair] * loss->averaged);
  core_tensor block = cosine_rows(loss, r);
  TRY(cosines(loss, r));
  KERN(loss->env, contrastive_bwd, &op, weight, part(loss->lse.device, line_of(r, r->direction), r->lo, r->n),
       part(loss->lse.device, line_of(r, 1 - r->direction), 0, loss->B), block, loss->d_scale.device);
  KERN(loss->env, gemm, KERN_NN, block, loss->z[r->key], KERN_ADD,
       train_slice(loss->gradient[r->query], r->lo, r->n));
  return CORE_OK;
}

typedef core_status (*rows_work)(train_contrastive *, const rows *, double);

/* Every block of this rank's rows, in both directions of the pairs [first, last). */
static core_status for_own_rows(train_contrastive *loss, int32_t first, int32_t last, double scale,
                                rows_work work) {
  const train_layout *layout = &loss->env->layout;
  for (int32_t d = 2 * first; d < 2 * last; d++) {
    rows r = {.pair = d / 2, .direction = d % 2};
    r.query = r.direction ? loss->second[r.pair] : loss->first[r.pair];
    r.key = r.direction ? loss->first[r.pair] : loss->second[r.pair];
    for (int64_t micro = 0; micro < layout->micro_batches; micro++) {
      data_range range = train_layout_range(layout, layout->rank, r.query, micro);
      for (r.lo = range.lo; r.lo < range.hi; r.lo += r.n) {
        r.n = range.hi - r.lo < loss->block ? range.hi - r.lo : loss->block;
        TRY(work(loss, &r, scale));
      }
    }
  }
  return CORE_OK;
}

/* What the masks are made of. */
static core_status take_samples(train_contrastive *loss, const data_batch *batch, int32_t first,
                                int32_t last) {
  for (int32_t p = first; p < last; p++) {
    const uint8_t *a = batch->present + loss->first[p] * loss->B,
                  *b = batch->present + loss->second[p] * loss->B;
    uint8_t *valid = (uint8_t *)loss->valid.host + p * loss->B;
    loss->count[p] = 0;
    loss->loss[p] = 0;
    for (int64_t j = 0; j < loss->B; j++) {
      valid[j] = a[j] && b[j];
      loss->count[p] += valid[j];
    }
  }
  memcpy(loss->label.host, batch->label, (size_t)loss->B * sizeof *batch->label);
  memcpy(loss->id.host, batch->id, (size_t)loss->B * sizeof *batch->id);
  TRY(train_mirror_up(loss->env, &loss->valid, loss->pairs));
  TRY(train_mirror_up(loss->env, &loss->label, loss->B));
  TRY(train_mirror_up(loss->env, &loss->id, loss->B));
  return CORE_OK;
}

/* The denominators of direction d belong to the rows of its query modality. */
static core_status share_denominators(train_contrastive *loss, int32_t first, int32_t last) {
  for (int32_t d = 2 * first; d < 2 * last; d++) {
    int32_t query = d % 2 ? loss->second[d / 2] : loss->first[d / 2];
    TRY(train_share_rows(loss->env, &loss->env->layout, query, part(loss->lse.device, d, 0, loss->B),
                         loss->send, loss->recv));
  }
  return CORE_OK;
}

/* Embeddings that the pairs [first, last) are made of go round; their gradients begin at zero. */
static core_status share_embeddings(train_contrastive *loss, int32_t first, int32_t last) {
  train_env *env = loss->env;
  for (int32_t m = 0; m < env->layout.modalities; m++) {
    bool used = false;
    for (int32_t p = first; p < last; p++) used = used || loss->first[p] == m || loss->second[p] == m;
    if (!used) continue;
    TRY(train_share_rows(env, &env->layout, m, loss->z[m], loss->send, loss->recv));
    KERN(env, fill, 0, loss->gradient[m]);
  }
  return CORE_OK;
}

static core_status evaluate_pairs(train_contrastive *loss, const data_batch *batch, double scale,
                                  int32_t first, int32_t last) {
  train_env *env = loss->env;
  CHECK(batch->samples == loss->B, CORE_ERR_INTERNAL, "a batch of %lld samples, expected %lld",
        (long long)batch->samples, (long long)loss->B);
  TRY(take_samples(loss, batch, first, last));
  TRY(train_mirror_clear(env, &loss->d_scale));
  TRY(share_embeddings(loss, first, last));
  TRY(for_own_rows(loss, first, last, scale, denominators));
  TRY(share_denominators(loss, first, last));
  TRY(for_own_rows(loss, first, last, scale, gradients));
  TRY(train_mirror_down(env, &loss->lse, 2 * loss->pairs));
  TRY(train_mirror_down(env, &loss->positive, 2 * loss->pairs));
  TRY(train_mirror_down(env, &loss->d_scale, 1));
  TRY(for_own_rows(loss, first, last, scale, add_losses));
  return CORE_OK;
}

core_status train_contrastive_evaluate(train_contrastive *loss, const data_batch *batch, double scale) {
  TRY(evaluate_pairs(loss, batch, scale, 0, loss->pairs));
  return CORE_OK;
}

core_status train_contrastive_evaluate_pair(train_contrastive *loss, const data_batch *batch, double scale,
                                            int32_t pair) {
  TRY(evaluate_pairs(loss, batch, scale, pair, pair + 1));
  return CORE_OK;
}

double train_contrastive_total(const train_contrastive *loss, const double *summed) {
  double total = 0;
  for (int32_t p = 0; p < loss->pairs; p++)
    if (loss->count[p] > 0) total += summed[p] / ((double)loss->count[p] * loss->pairs);
  return total;
}
