#include "trainer/retrieval.h"

#include <stdlib.h>
#include <string.h>

#include "core/clock.h"
#include "core/stop.h"
#include "trainer/share_rows.h"
#include "trainer/item_vectors.h"

static const int64_t recall_at[TRAIN_RECALLS] = {1, 5, 10};
enum { BLOCK = 128 }; /* queries ranked at a time */

/* All embeddings of the split, on every rank. */
typedef struct gallery {
  int64_t samples, Z;
  int32_t modalities;
  int32_t direction;                     /* of a connector; -1: a tower's embeddings serve every direction */
  core_tensor z[CORE_MAX_MODALITIES];    /* [N, Z], device */
  uint8_t *present[CORE_MAX_MODALITIES]; /* [N] */
  uint64_t *id;
  int32_t *label;
  core_tensor score;     /* [BLOCK, N], device */
  core_real *host_score; /* the same where the host reads it */
  comm_piece *send, *recv;
} gallery;

static void gallery_free(const core_device *device, gallery *g) {
  for (int32_t m = 0; m < g->modalities; m++) {
    device->release(g->z[m].data);
    free(g->present[m]);
  }
  if (g->host_score != g->score.data) free(g->host_score);
  device->release(g->score.data);
  free(g->id);
  free(g->label);
  free(g->send);
  free(g->recv);
}

static core_status on_device(const core_device *device, int64_t rows, int64_t columns, core_tensor *out) {
  *out = core_tensor_2(NULL, CORE_REAL_DTYPE, rows, columns);
  TRY(device->allocate(core_tensor_bytes(out), &out->data));
  TRY(device->fill(out->data, 0, core_tensor_bytes(out), NULL));
  return CORE_OK;
}

static core_status gallery_make(train_session *session, gallery *g) {
  const core_device *device = session->env.ops->device;
  memset(g, 0, sizeof *g);
  size_t n = (size_t)data_set_samples(session->evaluation), pieces = (size_t)session->env.layout.ranks;
  g->samples = (int64_t)n;
  g->Z = session->model->Z;
  g->modalities = session->env.layout.modalities;
  bool good = true;
  for (int32_t m = 0; m < g->modalities; m++) {
    TRY(on_device(device, (int64_t)n, g->Z, &g->z[m]));
    g->present[m] = calloc(n, 1);
    good = good && g->present[m];
  }
  TRY(on_device(device, BLOCK, (int64_t)n, &g->score));
  g->host_score = device->host_access ? g->score.data : malloc(n * BLOCK * sizeof *g->host_score);
  g->id = calloc(n, sizeof *g->id);
  g->label = calloc(n, sizeof *g->label);
  g->send = calloc(pieces, sizeof *g->send);
  g->recv = calloc(pieces, sizeof *g->recv);
  CHECK(good && g->id && g->label && g->host_score && g->send && g->recv, CORE_ERR_MEMORY,
        "no memory for the embeddings of %zu samples", n);
  return CORE_OK;
}

/* ---- embedding ---- */

/* Whether modality m has vectors in the gallery. */
static bool takes_part(const train_session *session, const gallery *g, int32_t m) {
  const train_direction *list = session->model->alignment.direction;
  return g->direction < 0 || list[g->direction].from == m || list[g->direction].toward == m;
}

static core_status take_batch(train_session *session, gallery *g, const data_batch *batch, int64_t first) {
  train_env *env = &session->env;
  train_layout layout = session->evaluation_layout;
  layout.batch = batch->samples; /* the last one may be short; ranges are cut to it */
  memcpy(g->id + first, batch->id, (size_t)batch->samples * sizeof *g->id);
  memcpy(g->label + first, batch->label, (size_t)batch->samples * sizeof *g->label);
  TRY(train_model_take(session->model, batch, 0, g->direction));
  TRY(train_model_forward(session->model, TRAIN_MODE_EVALUATE));
  TRY(env->ops->device->stream_wait(NULL)); /* the batch's latents have been fetched: it may be given back */
  for (int32_t m = 0; m < g->modalities; m++) {
    data_range range = train_layout_range(&layout, layout.rank, m, 0);
    core_tensor rows = train_slice(g->z[m], first, batch->samples);
    core_tensor own = train_slice(rows, range.lo, range.hi - range.lo);
    memcpy(g->present[m] + first, batch->present + m * batch->samples, (size_t)batch->samples);
    if (!takes_part(session, g, m)) continue;
    if (own.shape[0] > 0)
      TRY(env->ops->device->copy(own.data, train_item_vectors_rows(session, g->direction, m).data,
                                 core_tensor_bytes(&own), NULL));
    TRY(train_share_rows(env, &layout, m, rows, g->send, g->recv));
  }
  return CORE_OK;
}

static core_status embed_stream(train_session *session, gallery *g, data_stream *stream) {
  data_batch *batch = NULL;
  int64_t first = 0;
  do {
    comm_note(session->env.comm, session->env.step, -1, "evaluation data");
    TRY(train_item_vectors_batch(session, stream, &batch));
    if (!batch) break;
    core_status status = take_batch(session, g, batch, first);
    first += batch->samples;
    data_stream_put(stream, batch);
    if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  } while (first < g->samples);
  CHECK(first == g->samples, CORE_ERR_INTERNAL, "%lld of %lld samples were evaluated", (long long)first,
        (long long)g->samples);
  return CORE_OK;
}

static core_status embed(train_session *session, gallery *g) {
  data_stream *stream = NULL;
  data_position start = {0, 0, 0};
  core_status status =
      train_session_stream(session, session->evaluation, &session->evaluation_layout, &start, false, &stream);
  TRY(comm_agree(session->env.control, status));
  status = embed_stream(session, g, stream);
  data_stream_close(stream);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* ---- ranking ---- */

static bool same(const gallery *g, int64_t i, int64_t j) {
  return g->label[i] >= 0 ? g->label[i] == g->label[j] : g->id[i] == g->id[j];
}

/* Probability that none of p positives is among the first k of n in random order. */
static double chance_of_miss(int64_t n, int64_t p, int64_t k) {
  double miss = 1;
  for (int64_t i = 0; i < k; i++)
    miss *= n - i > 0 && n - p - i > 0 ? (double)(n - p - i) / (double)(n - i) : 0;
  return miss;
}

/* Ranks one query: its best positive against everything else, ties against it. */
static void rank_query(const gallery *g, int32_t a, int32_t b, int64_t i, const core_real *score,
                       train_retrieval *out) {
  int64_t positives = 0, above = 0, items = 0;
  core_real best = 0;
  for (int64_t j = 0; j < g->samples; j++) {
    if (!g->present[b][j]) continue;
    items++;
    if (!same(g, i, j)) continue;
    if (positives++ == 0 || score[j] > best) best = score[j];
  }
  if (positives == 0) return;
  for (int64_t j = 0; j < g->samples; j++) above += g->present[b][j] && !same(g, i, j) && !(score[j] < best);
  out->queries[a][b]++;
  for (int32_t k = 0; k < TRAIN_RECALLS; k++) {
    out->hits[a][b][k] += above < recall_at[k];
    out->chance[a][b][k] += 1 - chance_of_miss(items, positives, recall_at[k]);
  }
}

static core_status rank_direction(train_session *session, gallery *g, int32_t a, int32_t b,
                                  train_retrieval *out) {
  train_env *env = &session->env;
  int64_t first = g->samples * env->layout.rank / env->layout.ranks;
  int64_t last = g->samples * (env->layout.rank + 1) / env->layout.ranks;
  for (int64_t lo = first; lo < last; lo += BLOCK) {
    CHECK(!core_stop_requested(), CORE_ERR_STOPPED, "stopped during evaluation");
    int64_t n = last - lo < BLOCK ? last - lo : BLOCK;
    core_tensor score = train_rows(g->score, n);
    KERN(env, gemm, KERN_NT, train_slice(g->z[a], lo, n), g->z[b], KERN_SET, score);
    if (g->host_score != score.data)
      TRY(env->ops->device->copy(g->host_score, score.data, core_tensor_bytes(&score), NULL));
    for (int64_t i = lo; i < lo + n; i++)
      if (g->present[a][i]) rank_query(g, a, b, i, g->host_score + (i - lo) * g->samples, out);
  }
  return CORE_OK;
}

/* This rank's share of the queries, every direction that the gallery serves. Local. */
static core_status rank_own(train_session *session, gallery *g, train_retrieval *out) {
  for (int32_t a = 0; a < g->modalities; a++) {
    out->gallery[a] = 0;
    for (int64_t i = 0; i < g->samples; i++) out->gallery[a] += g->present[a][i];
    for (int32_t b = 0; b < g->modalities; b++)
      if (a != b && g->direction < 0) TRY(rank_direction(session, g, a, b, out));
  }
  if (g->direction < 0) return CORE_OK;
  const train_direction *d = &session->model->alignment.direction[g->direction];
  TRY(rank_direction(session, g, d->from, d->toward, out));
  return CORE_OK;
}

static core_status add_up_ranks(train_session *session, gallery *g, train_retrieval *out) {
  comm_group *world = session->env.world;
  int64_t cells = CORE_MAX_MODALITIES * CORE_MAX_MODALITIES;
  TRY(comm_all_reduce(world, COMM_SUM, CORE_INT64, out->queries, cells));
  TRY(comm_all_reduce(world, COMM_SUM, CORE_INT64, out->hits, cells * TRAIN_RECALLS));
  TRY(comm_all_reduce(world, COMM_SUM, CORE_FLOAT64, out->chance, cells * TRAIN_RECALLS));
  for (int32_t a = 0; a < g->modalities; a++)
    for (int32_t b = 0; b < g->modalities; b++)
      for (int32_t k = 0; k < TRAIN_RECALLS && out->queries[a][b] > 0; k++)
        out->chance[a][b][k] /= (double)out->queries[a][b];
  return CORE_OK;
}

/* The router's health figures, over all ranks. */
static core_status add_up_sums(train_session *session) {
  const train_moe_sums *sums = &session->model->sums;
  comm_group *world = session->env.world;
  TRY(comm_agree(session->env.control, train_moe_sums_down(&session->env, sums)));
  TRY(comm_all_reduce(world, COMM_SUM, CORE_FLOAT64, sums->value.host,
                      core_tensor_count(&sums->value.device)));
  TRY(comm_all_reduce(world, COMM_SUM, CORE_INT64, sums->count.host, core_tensor_count(&sums->count.device)));
  TRY(comm_all_reduce(world, COMM_SUM, CORE_FLOAT64, sums->gate_sum, train_moe_gate_count(sums)));
  return CORE_OK;
}

core_status train_retrieval_run(train_session *session, train_retrieval *out) {
  memset(out, 0, sizeof *out);
  double start = core_clock_now();
  const train_moe_sums *sums = &session->model->sums;
  gallery g;
  TRY(comm_agree(session->env.control, train_moe_sums_clear(&session->env, sums)));
  core_status status = comm_agree(session->env.control, gallery_make(session, &g));
  for (int32_t d = 0; d < train_model_directions(session->model) && status == CORE_OK; d++) {
    g.direction = session->env.settings->model.kind == TRAIN_KIND_CONNECTOR ? d : -1;
    status = embed(session, &g);
    if (status == CORE_OK) status = comm_agree(session->env.control, rank_own(session, &g, out));
  }
  if (status == CORE_OK) status = add_up_ranks(session, &g, out);
  if (status == CORE_OK) status = add_up_sums(session);
  out->samples = g.samples;
  gallery_free(session->env.ops->device, &g);
  out->seconds = core_clock_now() - start;
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

double train_retrieval_recall(const train_retrieval *result, int32_t a, int32_t b, int32_t k) {
  int64_t queries = result->queries[a][b];
  return queries > 0 ? (double)result->hits[a][b][k] / (double)queries : 0;
}

double train_retrieval_mean(const train_retrieval *result) {
  double sum = 0;
  int32_t directions = 0;
  for (int32_t a = 0; a < CORE_MAX_MODALITIES; a++)
    for (int32_t b = 0; b < CORE_MAX_MODALITIES; b++)
      if (result->queries[a][b] > 0) {
        sum += train_retrieval_recall(result, a, b, 0);
        directions++;
      }
  return directions > 0 ? sum / directions : 0;
}

void train_retrieval_print(const train_retrieval *result, const train_settings *settings, FILE *out) {
  fprintf(out, "%-24s %8s %8s %8s %8s %8s %26s\n", "direction", "queries", "gallery", "R@1", "R@5", "R@10",
          "chance R@1 / R@5 / R@10");
  for (unsigned a = 0; a < settings->data.modalities_count; a++)
    for (unsigned b = 0; b < settings->data.modalities_count; b++) {
      char name[2 * CORE_NAME];
      if (result->queries[a][b] == 0) continue;
      snprintf(name, sizeof name, "%s -> %s", settings->data.modalities[a].name,
               settings->data.modalities[b].name);
      fprintf(out, "%-24s %8lld %8lld", name, (long long)result->queries[a][b],
              (long long)result->gallery[b]);
      for (int k = 0; k < TRAIN_RECALLS; k++)
        fprintf(out, " %7.2f%%", 100 * train_retrieval_recall(result, (int32_t)a, (int32_t)b, k));
      fprintf(out, " %8.2f%% %6.2f%% %6.2f%%\n", 100 * result->chance[a][b][0], 100 * result->chance[a][b][1],
              100 * result->chance[a][b][2]);
    }
}
