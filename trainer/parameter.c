#include "trainer/parameter.h"

#include <fnmatch.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint.h" /* CKPT_CELL */
#include "core/random.h"

core_status train_parameters_add(train_parameters *set, const train_parameter *parameter, int32_t *index) {
  if (set->count == set->capacity) {
    int32_t capacity = set->capacity ? 2 * set->capacity : 64;
    train_parameter *grown = realloc(set->list, (size_t)capacity * sizeof *grown);
    CHECK(grown, CORE_ERR_MEMORY, "no memory for %d parameters", capacity);
    set->list = grown;
    set->capacity = capacity;
  }
  train_parameter *added = &set->list[set->count];
  *added = *parameter;
  added->count = 1;
  added->active = !added->frozen;
  for (int32_t i = 0; i < added->rank; i++) {
    CHECK(added->shape[i] > 0 && added->count <= ((int64_t)1 << 48) / added->shape[i], CORE_ERR_ARGUMENT,
          "the parameter '%s' has dimension %lld", added->name, (long long)added->shape[i]);
    added->count *= added->shape[i];
  }
  *index = set->count++;
  return CORE_OK;
}

static bool matches(const train_parameter *p, const char *pattern) {
  return fnmatch(pattern, p->name, 0) == 0;
}

void train_parameters_freeze(train_parameters *set, const char *pattern) {
  for (int32_t i = 0; i < set->count; i++) {
    if (!matches(&set->list[i], pattern)) continue;
    set->list[i].frozen = true;
    set->list[i].active = false;
  }
}

int32_t train_scope_number(const train_parameter *parameter) {
  return parameter->scope == TRAIN_SCOPE_MODALITY ? 2 + parameter->modality : (int32_t)parameter->scope;
}

comm_group *train_scope_group(const train_env *env, int32_t scope) {
  return scope == TRAIN_SCOPE_WORLD    ? env->world
         : scope == TRAIN_SCOPE_EXPERT ? env->replica
                                       : env->modality[scope - 2];
}

/* A scope begins on a cache line. */
static int64_t aligned(int64_t at) {
  return (at + 15) / 16 * 16;
}

void train_parameters_place(train_parameters *set) {
  int64_t at = 0, gradient = 0;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++) {
    set->scope_first[scope] = at = aligned(at);
    set->gradient_scope[scope] = gradient = aligned(gradient);
    for (int32_t i = 0; i < set->count; i++) {
      train_parameter *p = &set->list[i];
      if (train_scope_number(p) != scope) continue;
      p->first = at;
      at += p->count;
      p->gradient_first = p->frozen ? -1 : gradient;
      if (!p->frozen) gradient += p->count;
    }
  }
  set->scope_first[TRAIN_SCOPES] = set->total = at;
  set->gradient_scope[TRAIN_SCOPES] = set->gradient_total = gradient;
}

train_span train_span_common(train_span a, train_span b) {
  int64_t first = a.first > b.first ? a.first : b.first;
  int64_t last = a.first + a.count, end = b.first + b.count;
  if (end < last) last = end;
  return (train_span){first, last > first ? last - first : 0};
}

train_span train_parameter_within(const train_parameter *p, train_span span) {
  return train_span_common((train_span){p->first, p->count}, span);
}

train_span train_gradient_within(const train_parameter *p, train_span span) {
  if (p->frozen) return (train_span){span.first, 0};
  return train_span_common((train_span){p->gradient_first, p->count}, span);
}

bool train_parameters_next_active(const train_parameters *set, int32_t scope, int32_t *from,
                                  train_stretch *out) {
  *out = (train_stretch){{0, 0}, {0, 0}};
  for (; *from < set->count; ++*from) {
    const train_parameter *p = &set->list[*from];
    if (train_scope_number(p) != scope) continue;
    if (!p->active && out->value.count > 0) break;
    if (!p->active) continue;
    if (out->value.count == 0) out->value.first = p->first;
    if (out->value.count == 0) out->gradient.first = p->gradient_first;
    out->value.count = out->gradient.count = p->first + p->count - out->value.first;
  }
  return out->value.count > 0;
}

/* The two flat spaces. */
typedef enum space { VALUES, GRADIENTS } space;

static int64_t first_in(const train_parameter *p, space where) {
  return where == VALUES ? p->first : p->gradient_first;
}

/* Whether parameter i lies in this scope of this space. */
static bool lies_in(const train_parameters *set, int32_t i, int32_t scope, space where) {
  return train_scope_number(&set->list[i]) == scope && (where == VALUES || !set->list[i].frozen);
}

/* All of a scope, to the end of its last parameter: gaps lie only between scopes. */
static train_span scope_span(const train_parameters *set, int32_t scope, space where) {
  int64_t first = where == VALUES ? set->scope_first[scope] : set->gradient_scope[scope], end = first;
  for (int32_t i = 0; i < set->count; i++)
    if (lies_in(set, i, scope, where)) end = first_in(&set->list[i], where) + set->list[i].count;
  return (train_span){first, end - first};
}

/* The place nearest to `ideal` where a scope may be cut: at a parameter's ends or cells. */
static int64_t nearest_cut(const train_parameters *set, int32_t scope, space where, int64_t ideal) {
  for (int32_t i = 0; i < set->count; i++) {
    const train_parameter *p = &set->list[i];
    int64_t inside = ideal - first_in(p, where);
    if (!lies_in(set, i, scope, where) || inside < 0 || inside >= p->count) continue;
    int64_t low = inside / CKPT_CELL * CKPT_CELL,
            high = low + CKPT_CELL < p->count ? low + CKPT_CELL : p->count;
    return first_in(p, where) + (inside - low <= high - inside ? low : high);
  }
  return ideal;
}

static train_span share_of(const train_parameters *set, int32_t scope, space where, int32_t rank,
                           int32_t size) {
  train_span all = scope_span(set, scope, where);
  int64_t each = all.count / size, end = all.first + all.count;
  if (all.count == 0) return all;
  int64_t lo = rank == 0 ? all.first : nearest_cut(set, scope, where, all.first + each * rank);
  int64_t hi = rank == size - 1 ? end : nearest_cut(set, scope, where, all.first + each * (rank + 1));
  return (train_span){lo, hi - lo};
}

train_span train_parameters_share_of(const train_parameters *set, int32_t scope, int32_t rank, int32_t size) {
  return share_of(set, scope, VALUES, rank, size);
}

train_span train_gradients_share_of(const train_parameters *set, int32_t scope, int32_t rank, int32_t size) {
  return share_of(set, scope, GRADIENTS, rank, size);
}

void train_parameters_share(train_parameters *set, const train_env *env, bool sharded) {
  set->state_first[0] = 0;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++) {
    const comm_group *group = train_scope_group(env, scope);
    int32_t rank = group ? comm_rank(group) : 0, size = group ? comm_size(group) : 1;
    train_span *share = &set->share[scope], *gradient = &set->gradient_share[scope];
    *share = train_parameters_share_of(set, scope, rank, size);
    *gradient = train_gradients_share_of(set, scope, rank, size);
    if (!group) share->count = gradient->count = 0;
    set->update[scope] = sharded ? *gradient : scope_span(set, scope, GRADIENTS);
    set->state_first[scope + 1] = set->state_first[scope] + aligned(set->update[scope].count);
  }
}

core_status train_parameters_plan(train_parameters *set, const train_env *env, core_arena *arena,
                                  bool training) {
  TRY(ARENA_TAKE(arena, set->total, &set->value));
  if (env->active == CORE_BFLOAT16) TRY(ARENA_TAKE(arena, set->total, &set->copy));
  if (!training) return CORE_OK;
  TRY(ARENA_TAKE(arena, set->gradient_total, &set->gradient));
  TRY(ARENA_TAKE(arena, set->state_first[TRAIN_SCOPES], &set->m));
  TRY(ARENA_TAKE(arena, set->state_first[TRAIN_SCOPES], &set->v));
  return CORE_OK;
}

void train_parameter_draw(const train_parameter *parameter, uint64_t seed, core_real *value) {
  uint64_t stream = core_random_stream(CORE_RANDOM_INIT, core_hash_text(parameter->name), 0);
  double fixed = parameter->init == TRAIN_INIT_ZERO  ? 0
                 : parameter->init == TRAIN_INIT_ONE ? 1
                                                     : parameter->init_value;
  for (int64_t i = 0; i < parameter->count; i++) {
    double number = fixed;
    if (parameter->init == TRAIN_INIT_NORMAL)
      number = parameter->init_value * core_random_normal(seed, stream, (uint64_t)i);
    if (parameter->init == TRAIN_INIT_UNIFORM)
      number = parameter->init_value * (2 * core_random_uniform(seed, stream, (uint64_t)i) - 1);
    value[i] = (core_real)number;
  }
}

/* Draws on the host; `stage` [largest parameter] is NULL where the host writes the values itself. */
static core_status draw_all(train_parameters *set, const train_env *env, core_real *stage) {
  for (int32_t i = 0; i < set->count; i++) {
    const train_parameter *p = &set->list[i];
    core_real *target = set->value + p->first;
    train_parameter_draw(p, env->settings->run.seed, stage ? stage : target);
    if (stage) TRY(env->ops->device->copy(target, stage, (size_t)p->count * sizeof *stage, NULL));
  }
  return CORE_OK;
}

static core_status zero(const train_env *env, core_real *data, int64_t count) {
  if (data && count > 0) TRY(env->ops->device->fill(data, 0, (size_t)count * sizeof *data, NULL));
  return CORE_OK;
}

core_status train_parameters_initialise(train_parameters *set, const train_env *env) {
  int64_t largest = 1;
  for (int32_t i = 0; i < set->count; i++)
    if (set->list[i].count > largest) largest = set->list[i].count;
  core_real *stage = NULL;
  if (!env->ops->device->host_access) {
    stage = malloc((size_t)largest * sizeof *stage);
    CHECK(stage, CORE_ERR_MEMORY, "no memory for a parameter of %lld numbers", (long long)largest);
  }
  TRY(zero(env, set->value, set->total)); /* gaps between scopes too */
  TRY(zero(env, set->gradient, set->gradient_total));
  TRY(zero(env, set->m, set->state_first[TRAIN_SCOPES]));
  TRY(zero(env, set->v, set->state_first[TRAIN_SCOPES]));
  core_status status = draw_all(set, env, stage);
  free(stage);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  TRY(train_parameters_round(set, env, (train_span){0, set->total}));
  return CORE_OK;
}

core_status train_parameters_round(train_parameters *set, const train_env *env, train_span span) {
  if (!set->copy || span.count == 0) return CORE_OK;
  KERN(env, cast, core_tensor_1(set->value + span.first, CORE_REAL_DTYPE, span.count),
       core_tensor_1(set->copy + span.first, CORE_BFLOAT16, span.count));
  return CORE_OK;
}

void train_parameters_free(train_parameters *set) {
  free(set->list);
  memset(set, 0, sizeof *set);
}

/* One parameter, or `count` > 0 neighbours, from element `first` of a flat array on; -1: absent. */
static core_tensor view(const train_parameters *set, void *base, core_dtype dtype, int64_t first,
                        int32_t index, int64_t count) {
  const train_parameter *p = &set->list[index];
  core_tensor tensor = {NULL, dtype, p->rank, {1, 1, 1, 1}};
  if (base && first >= 0) tensor.data = (char *)base + (size_t)first * core_dtype_size(dtype);
  if (count > 0) {
    tensor.rank = p->rank + 1;
    tensor.shape[0] = count;
  }
  for (int32_t i = 0; i < p->rank; i++) tensor.shape[i + (count > 0)] = p->shape[i];
  return tensor;
}

core_tensor train_parameter_value(const train_parameters *set, int32_t index) {
  return train_parameter_vectors(set, index, 0);
}

core_tensor train_parameter_gradient(const train_parameters *set, int32_t index) {
  return train_parameter_gradients(set, index, 0);
}

core_tensor train_parameter_matrices(const train_parameters *set, int32_t index, int64_t count) {
  int64_t first = set->list[index].first;
  return set->copy ? view(set, set->copy, CORE_BFLOAT16, first, index, count)
                   : view(set, set->value, CORE_REAL_DTYPE, first, index, count);
}

core_tensor train_parameter_vectors(const train_parameters *set, int32_t index, int64_t count) {
  if (index < 0) return core_tensor_1(NULL, CORE_REAL_DTYPE, 0);
  return view(set, set->value, CORE_REAL_DTYPE, set->list[index].first, index, count);
}

core_tensor train_parameter_matrix(const train_parameters *set, int32_t index) {
  return train_parameter_matrices(set, index, 0);
}

core_tensor train_parameter_gradients(const train_parameters *set, int32_t index, int64_t count) {
  if (index < 0) return core_tensor_1(NULL, CORE_REAL_DTYPE, 0);
  for (int64_t i = 0; i < count; i++)
    if (set->list[index + i].frozen) return core_tensor_1(NULL, CORE_REAL_DTYPE, 0);
  return view(set, set->gradient, CORE_REAL_DTYPE, set->list[index].gradient_first, index, count);
}

bool train_parameter_trained(const train_parameters *set, int32_t index) {
  return index >= 0 && !set->list[index].frozen;
}
