#include "trainer/reduction.h"

#include <string.h>

static bool moved_by_nccl(const train_env *env) {
  return strcmp(comm_device_transport_name(env->world), "nccl") == 0;
}

core_status train_reduction_make(train_model *model, train_reduction *out) {
  const train_env *env = model->env;
  const core_device *device = env->ops->device;
  int overlap = env->settings->parallel.overlap;
  bool nccl = moved_by_nccl(env);
  *out = (train_reduction){.model = model};
  out->early = overlap == TRAIN_OVERLAP_ALWAYS || (overlap == TRAIN_OVERLAP_AUTO && nccl);
  out->cut = overlap == TRAIN_OVERLAP_ALWAYS || nccl;
  out->most = INT64_MAX;
  if (out->cut) out->most = (int64_t)(env->settings->parallel.bucket * (1 << 20) / sizeof(core_real));
  if (!out->early || device->host_access) return CORE_OK;
  TRY(device->stream_create(&out->stream));
  TRY(device->event_create(&out->ready));
  TRY(device->event_create(&out->done));
  return CORE_OK;
}

void train_reduction_free(train_reduction *reduction) {
  if (!reduction->model) return;
  const core_device *device = reduction->model->env->ops->device;
  if (reduction->ready) device->event_destroy(reduction->ready);
  if (reduction->done) device->event_destroy(reduction->done);
  if (reduction->stream) device->stream_destroy(reduction->stream);
  memset(reduction, 0, sizeof *reduction);
}

static core_status plan_bounds(train_reduction *reduction, int32_t scope, int32_t size, core_arena *arena) {
  const train_parameters *set = &reduction->model->parameters;
  int64_t *bound = NULL;
  TRY(ARENA_TAKE(arena, size + 1, &bound));
  reduction->bound[scope] = bound;
  if (!bound) return CORE_OK;
  for (int32_t r = 0; r < size; r++) {
    train_span share = train_gradients_share_of(set, scope, r, size);
    bound[r] = share.first;
    bound[r + 1] = share.first + share.count;
  }
  return CORE_OK;
}

core_status train_reduction_plan(train_reduction *reduction, const train_arenas *arenas) {
  const train_env *env = reduction->model->env;
  int32_t largest = 0;
  TRY(ARENA_TAKE(arenas->host, reduction->model->parameters.count, &reduction->bucket));
  for (int32_t scope = 0; scope < TRAIN_SCOPES && env->settings->parallel.shard_optimizer; scope++) {
    const comm_group *group = train_scope_group(env, scope);
    if (!group) continue;
    int32_t size = comm_size(group);
    CHECK(size <= TRAIN_MAX_RANKS, CORE_ERR_UNSUPPORTED, "more than %d ranks in a group",
          (int)TRAIN_MAX_RANKS);
    if (size > largest) largest = size;
    TRY(plan_bounds(reduction, scope, size, arenas->host));
  }
  TRY(ARENA_TAKE(arenas->host, largest, &reduction->share));
  return CORE_OK;
}

/* ---- buckets ---- */

/* Parameters come from the end of a scope on, which is the order in which blocks become final. One joins the
 * bucket that lies behind it; but what is final within the pass is not kept back for what is so at its end.
 */
static bool joins(const train_reduction *reduction, const train_bucket *bucket, const train_parameter *p,
                  int64_t point) {
  int64_t end = train_model_points(reduction->model) - 1;
  return bucket->scope == train_scope_number(p) && bucket->place.first == p->gradient_first + p->count &&
         bucket->place.count < reduction->most && bucket->point <= point &&
         (bucket->point == end) == (point == end);
}

static void add(train_reduction *reduction, const train_parameter *p) {
  int64_t end = train_model_points(reduction->model) - 1;
  int64_t point = reduction->cut ? train_parameter_point(reduction->model, p) : end;
  train_bucket *last = reduction->count > 0 ? &reduction->bucket[reduction->count - 1] : NULL;
  if (last && joins(reduction, last, p, point)) {
    last->point = point;
    last->place.first = p->gradient_first;
    last->place.count += p->count;
    return;
  }
  reduction->bucket[reduction->count++] =
      (train_bucket){train_scope_number(p), point, {p->gradient_first, p->count}};
}

void train_reduction_begin(train_reduction *reduction) {
  const train_parameters *set = &reduction->model->parameters;
  reduction->count = reduction->ahead = 0;
  reduction->reached = 0;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++)
    for (int32_t i = set->count - 1; i >= 0; i--)
      if (set->list[i].active && train_scope_number(&set->list[i]) == scope) add(reduction, &set->list[i]);
}

/* ---- reducing ---- */

static core_status reduce(const train_reduction *reduction, const train_bucket *bucket) {
  const train_model *model = reduction->model;
  comm_group *group = train_scope_group(model->env, bucket->scope);
  core_real *gradient = model->parameters.gradient + bucket->place.first;
  const int64_t *bound = reduction->bound[bucket->scope];
  if (!bound) {
    TRY(comm_device_all_reduce(group, COMM_SUM, CORE_REAL_DTYPE, gradient, bucket->place.count,
                               reduction->stream));
    return CORE_OK;
  }
  for (int32_t r = 0; r < comm_size(group); r++)
    reduction->share[r] =
        train_span_common(bucket->place, (train_span){bound[r], bound[r + 1] - bound[r]}).count;
  TRY(comm_device_reduce_scatter(group, CORE_REAL_DTYPE, gradient, reduction->share, reduction->stream));
  return CORE_OK;
}

/* Everything up to a point, in the order of the points. The stream waits for what the main one has been given
 * so far, and for nothing that comes after. */
static core_status reduce_up_to(train_reduction *reduction, int64_t point, int32_t *count) {
  const core_device *device = reduction->model->env->ops->device;
  bool waits = reduction->stream != NULL;
  *count = 0;
  for (; reduction->reached <= point; reduction->reached++)
    for (int32_t i = 0; i < reduction->count; i++) {
      if (reduction->bucket[i].point != reduction->reached) continue;
      if (waits) {
        TRY(device->event_record(reduction->ready, NULL));
        TRY(device->event_before(reduction->stream, reduction->ready));
      }
      waits = false;
      TRY(reduce(reduction, &reduction->bucket[i]));
      ++*count;
    }
  return CORE_OK;
}

static core_status on_passed(void *context, int64_t point) {
  train_reduction *reduction = context;
  const train_env *env = reduction->model->env;
  int32_t count;
  comm_note(env->comm, env->step, -1, "gradient reduction");
  TRY(reduce_up_to(reduction, point, &count));
  reduction->ahead += count;
  return CORE_OK;
}

train_pass_observer train_reduction_observer(train_reduction *reduction) {
  return (train_pass_observer){reduction->early ? on_passed : NULL, reduction};
}

core_status train_reduction_finish(train_reduction *reduction) {
  const train_env *env = reduction->model->env;
  const core_device *device = env->ops->device;
  int32_t count;
  comm_note(env->comm, env->step, -1, "gradient reduction");
  TRY(reduce_up_to(reduction, train_model_points(reduction->model) - 1, &count));
  if (!reduction->stream) return CORE_OK;
  TRY(device->event_record(reduction->done, reduction->stream));
  TRY(device->event_before(NULL, reduction->done));
  return CORE_OK;
}
