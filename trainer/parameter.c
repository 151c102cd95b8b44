#include "trainer/parameter.h"

#include <stdlib.h>
#include <string.h>

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
  for (int32_t i = 0; i < added->rank; i++) {
    CHECK(added->shape[i] > 0 && added->count <= ((int64_t)1 << 48) / added->shape[i], CORE_ERR_ARGUMENT,
          "the parameter '%s' has dimension %lld", added->name, (long long)added->shape[i]);
    added->count *= added->shape[i];
  }
  *index = set->count++;
  return CORE_OK;
}

static int32_t scope_number(const train_parameter *parameter) {
  return parameter->scope == TRAIN_SCOPE_MODALITY ? 2 + parameter->modality : (int32_t)parameter->scope;
}

void train_parameters_place(train_parameters *set) {
  int64_t at = 0;
  enum { SCOPES = 2 + CORE_MAX_MODALITIES };
  for (int32_t scope = 0; scope < SCOPES; scope++) {
    at = (at + 15) / 16 * 16; /* a scope begins on a cache line */
    set->scope_first[scope] = at;
    for (int32_t i = 0; i < set->count; i++) {
      if (scope_number(&set->list[i]) != scope) continue;
      set->list[i].first = at;
      at += set->list[i].count;
    }
  }
  set->scope_first[SCOPES] = set->total = at;
}

core_status train_parameters_plan(train_parameters *set, core_arena *arena, bool training) {
  TRY(ARENA_TAKE(arena, set->total, &set->value));
  if (!training) return CORE_OK;
  TRY(ARENA_TAKE(arena, set->total, &set->gradient));
  TRY(ARENA_TAKE(arena, set->total, &set->m));
  TRY(ARENA_TAKE(arena, set->total, &set->v));
  return CORE_OK;
}

static void initialise(const train_parameter *parameter, uint64_t seed, core_real *value) {
  uint64_t stream = core_random_stream(CORE_RANDOM_INIT, core_hash_text(parameter->name), 0);
  double fixed = parameter->init == TRAIN_INIT_ZERO  ? 0
                 : parameter->init == TRAIN_INIT_ONE ? 1
                                                     : parameter->init_value;
  for (int64_t i = 0; i < parameter->count; i++)
    value[i] = parameter->init == TRAIN_INIT_NORMAL
                   ? (core_real)(parameter->init_value * core_random_normal(seed, stream, (uint64_t)i))
                   : (core_real)fixed;
}

void train_parameters_initialise(train_parameters *set, uint64_t seed) {
  memset(set->value, 0, (size_t)set->total * sizeof *set->value); /* gaps between scopes too */
  for (int32_t i = 0; i < set->count; i++) initialise(&set->list[i], seed, set->value + set->list[i].first);
  if (!set->gradient) return;
  memset(set->gradient, 0, (size_t)set->total * sizeof *set->gradient);
  memset(set->m, 0, (size_t)set->total * sizeof *set->m);
  memset(set->v, 0, (size_t)set->total * sizeof *set->v);
}

void train_parameters_free(train_parameters *set) {
  free(set->list);
  memset(set, 0, sizeof *set);
}

static core_tensor view(const train_parameters *set, core_real *base, int32_t index, int64_t count) {
  const train_parameter *p = &set->list[index];
  core_tensor tensor = {base ? base + p->first : NULL, CORE_REAL_DTYPE, p->rank, {1, 1, 1, 1}};
  if (count > 0) {
    tensor.rank = p->rank + 1;
    tensor.shape[0] = count;
  }
  for (int32_t i = 0; i < p->rank; i++) tensor.shape[i + (count > 0)] = p->shape[i];
  return tensor;
}

core_tensor train_parameter_value(const train_parameters *set, int32_t index) {
  return view(set, set->value, index, 0);
}

core_tensor train_parameter_gradient(const train_parameters *set, int32_t index) {
  return view(set, set->gradient, index, 0);
}

core_tensor train_parameter_values(const train_parameters *set, int32_t index, int64_t count) {
  return view(set, set->value, index, count);
}

core_tensor train_parameter_gradients(const train_parameters *set, int32_t index, int64_t count) {
  return view(set, set->gradient, index, count);
}
