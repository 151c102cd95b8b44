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
  return CORE_OK;
}

core_status train_contrastive_plan(train_contrastive *loss, core_arena *arena) {
  int64_t pieces = train_share_pieces(&loss->env->layout);
  for (int32_t m = 0; m < loss->env->layout.modalities; m++) {
    TRY(ARENA_TAKE(arena, loss->B * loss->Z, &loss->z[m]));
    TRY(ARENA_TAKE(arena, loss->B * loss->Z, &loss->gradient[m]));
  }
  TRY(ARENA_TAKE(arena, 2 * loss->pairs * loss->B, &loss->lse));
  TRY(ARENA_TAKE(arena, 2 * loss->pairs * loss->B, &loss->positive));
  TRY(ARENA_TAKE(arena, loss->block * loss->B, &loss->cosine));
  TRY(ARENA_TAKE(arena, loss->block, &loss->own));
  TRY(ARENA_TAKE(arena, loss->pairs * loss->B, &loss->valid));
  TRY(ARENA_TAKE(arena, pieces, &loss->send));
  TRY(ARENA_TAKE(arena, pieces, &loss->recv));
  return CORE_OK;
}

core_status train_contrastive_put(train_contrastive *loss, const train_model *model, int64_t micro) {
  const train_env *env = loss->env;
  for (int32_t m = 0; m < env->layout.modalities; m++) {
    data_range range = train_layout_range(&env->layout, env->layout.rank, m, micro);
    size_t bytes = (size_t)((range.hi - range.lo) * loss->Z) * sizeof(core_real);
    if (bytes > 0)
      TRY(env->ops->device->copy(loss->z[m] + range.lo * loss->Z, model->head[m].z.data, bytes, NULL));
  }
  return CORE_OK;
}

core_status train_contrastive_get(const train_contrastive *loss, train_model *model, int64_t micro) {
  const train_env *env = loss->env;
  for (int32_t m = 0; m < env->layout.modalities; m++) {
    data_range range = train_layout_range(&env->layout, env->layout.rank, m, micro);
    size_t bytes = (size_t)((range.hi - range.lo) * loss->Z) * sizeof(core_real);
    if (bytes > 0)
      TRY(env->ops->device->copy(model->head[m].gradient.data, loss->gradient[m] + range.lo * loss->Z, bytes,
                                 NULL));
  }
  return CORE_OK;
}

/* A block of own rows of one direction of one pair. */
typedef struct rows {
  int32_t pair, direction; /* 0: first -> second */
  int32_t query, key;      /* modalities */
  int64_t lo, n;
} rows;

static core_tensor matrix(core_real *data, int64_t n, int64_t columns) {
  return core_tensor_2(data, CORE_REAL_DTYPE, n, columns);
}

static core_tensor vector(core_real *data, int64_t n) {
  return core_tensor_1(data, CORE_REAL_DTYPE, n);
}

static core_real *line(core_real *base, const train_contrastive *loss, int32_t pair, int32_t direction) {
  return base + (2 * pair + direction) * loss->B;
}

static kern_contrastive describe(train_contrastive *loss, const data_batch *batch, const rows *r,
                                 double scale) {
  for (int64_t i = 0; i < r->n; i++) loss->own[i] = r->lo + i;
  return (kern_contrastive){.scale = scale,
                            .own = loss->own,
                            .valid = loss->valid + r->pair * loss->B,
                            .label = batch->label,
                            .id = batch->id};
}

static core_status cosines(train_contrastive *loss, const rows *r) {
  KERN(loss->env, gemm, KERN_NT, matrix(loss->z[r->query] + r->lo * loss->Z, r->n, loss->Z),
       matrix(loss->z[r->key], loss->B, loss->Z), KERN_SET, matrix(loss->cosine, r->n, loss->B));
  return CORE_OK;
}

static core_status denominators(train_contrastive *loss, const data_batch *batch, const rows *r,
                                double scale) {
  kern_contrastive op = describe(loss, batch, r, scale);
  core_real *lse = line(loss->lse, loss, r->pair, r->direction) + r->lo;
  core_real *positive = line(loss->positive, loss, r->pair, r->direction) + r->lo;
  TRY(cosines(loss, r));
  KERN(loss->env, contrastive_fwd, &op, matrix(loss->cosine, r->n, loss->B), vector(lse, r->n),
       vector(positive, r->n));
  for (int64_t i = 0; i < r->n; i++) loss->loss[r->pair] += 0.5 * ((double)lse[i] - (double)positive[i]);
  return CORE_OK;
}

static core_status gradients(train_contrastive *loss, const data_batch *batch, const rows *r, double scale) {
  if (loss->count[r->pair] == 0) return CORE_OK;
  kern_contrastive op = describe(loss, batch, r, scale);
  double weight = 0.5 / ((double)loss->count[r->pair] * loss->pairs);
  core_tensor block = matrix(loss->cosine, r->n, loss->B);
  TRY(cosines(loss, r));
  KERN(loss->env, contrastive_bwd, &op, weight,
       vector(line(loss->lse, loss, r->pair, r->direction) + r->lo, r->n),
       vector(line(loss->lse, loss, r->pair, 1 - r->direction), loss->B), block, &loss->d_scale);
  KERN(loss->env, gemm, KERN_NN, block, matrix(loss->z[r->key], loss->B, loss->Z), KERN_ADD,
       matrix(loss->gradient[r->query] + r->lo * loss->Z, r->n, loss->Z));
  return CORE_OK;
}

typedef core_status (*rows_work)(train_contrastive *, const data_batch *, const rows *, double);

/* Every block of this rank's rows, in both directions of every pair. */
static core_status for_own_rows(train_contrastive *loss, const data_batch *batch, double scale,
                                rows_work work) {
  const train_layout *layout = &loss->env->layout;
  for (int32_t d = 0; d < 2 * loss->pairs; d++) {
    rows r = {.pair = d / 2, .direction = d % 2};
    r.query = r.direction ? loss->second[r.pair] : loss->first[r.pair];
    r.key = r.direction ? loss->first[r.pair] : loss->second[r.pair];
    for (int64_t micro = 0; micro < layout->micro_batches; micro++) {
      data_range range = train_layout_range(layout, layout->rank, r.query, micro);
      for (r.lo = range.lo; r.lo < range.hi; r.lo += r.n) {
        r.n = range.hi - r.lo < loss->block ? range.hi - r.lo : loss->block;
        TRY(work(loss, batch, &r, scale));
      }
    }
  }
  return CORE_OK;
}

static void find_valid(train_contrastive *loss, const data_batch *batch) {
  for (int32_t p = 0; p < loss->pairs; p++) {
    const uint8_t *a = batch->present + loss->first[p] * loss->B,
                  *b = batch->present + loss->second[p] * loss->B;
    loss->count[p] = 0;
    for (int64_t j = 0; j < loss->B; j++) {
      uint8_t both = a[j] && b[j];
      loss->valid[p * loss->B + j] = both;
      loss->count[p] += both;
    }
  }
}

/* The denominators of direction d belong to the rows of its query modality. */
static core_status share_denominators(train_contrastive *loss) {
  for (int32_t d = 0; d < 2 * loss->pairs; d++) {
    int32_t query = d % 2 ? loss->second[d / 2] : loss->first[d / 2];
    TRY(train_share_rows(loss->env, &loss->env->layout, query, loss->lse + d * loss->B, sizeof(core_real),
                         loss->send, loss->recv));
  }
  return CORE_OK;
}

core_status train_contrastive_evaluate(train_contrastive *loss, const data_batch *batch, double scale) {
  train_env *env = loss->env;
  CHECK(batch->samples == loss->B, CORE_ERR_INTERNAL, "a batch of %lld samples, expected %lld",
        (long long)batch->samples, (long long)loss->B);
  find_valid(loss, batch);
  memset(loss->loss, 0, sizeof loss->loss);
  loss->d_scale = 0;
  for (int32_t m = 0; m < env->layout.modalities; m++) {
    TRY(train_share_rows(env, &env->layout, m, loss->z[m], loss->Z * (int64_t)sizeof(core_real), loss->send,
                         loss->recv));
    KERN(env, fill, 0, matrix(loss->gradient[m], loss->B, loss->Z));
  }
  TRY(for_own_rows(loss, batch, scale, denominators));
  TRY(share_denominators(loss));
  TRY(for_own_rows(loss, batch, scale, gradients));
  return CORE_OK;
}

double train_contrastive_total(const train_contrastive *loss, const double *summed) {
  double total = 0;
  for (int32_t p = 0; p < loss->pairs; p++)
    if (loss->count[p] > 0) total += summed[p] / ((double)loss->count[p] * loss->pairs);
  return total;
}
