/* What the ranks declare, gathered on rank 0 into one catalogue that covers every element exactly once. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint_impl.h"

/* One declaration on the wire. */
typedef struct declared {
  char name[CORE_NAME];
  int64_t shape[CORE_MAX_RANK];
  int64_t first, count;
  int32_t dtype, rank;
  int32_t owner;
  int32_t from; /* rank that declares it; set on arrival */
} declared;

core_status ckpt_tensor_check(const ckpt_tensor *t) {
  char shape[96];
  CHECK(t->name != NULL && ckpt_name_valid(t->name), CORE_ERR_ARGUMENT,
        "tensor name \"%.100s\": expected 1 to %d bytes without blanks, quotes and backslashes",
        t->name == NULL ? "" : t->name, CORE_NAME - 1);
  CHECK(t->dtype >= 0 && t->dtype < CORE_DTYPE_COUNT && t->rank >= 0 && t->rank <= CORE_MAX_RANK,
        CORE_ERR_ARGUMENT, "tensor %s: dtype %d of rank %d does not exist", t->name, (int)t->dtype, t->rank);
  int64_t count = ckpt_shape_count(t->dtype, t->rank, t->shape);
  ckpt_shape_text(t->rank, t->shape, shape);
  CHECK(count >= 0, CORE_ERR_ARGUMENT, "tensor %s has the impossible shape %s", t->name, shape);
  CHECK(t->first >= 0 && t->count >= 0 && t->first <= count && t->count <= count - t->first,
        CORE_ERR_ARGUMENT, "tensor %s: %lld elements from %lld are outside the shape %s", t->name,
        (long long)t->count, (long long)t->first, shape);
  CHECK(t->data != NULL || t->count == 0, CORE_ERR_ARGUMENT, "tensor %s has no memory for %lld elements",
        t->name, (long long)t->count);
  return CORE_OK;
}

static int compare(const void *left, const void *right) {
  const declared *a = left, *b = right;
  int names = strcmp(a->name, b->name);
  if (names != 0) return names;
  if (a->first != b->first) return a->first < b->first ? -1 : 1;
  return a->from < b->from ? -1 : a->from > b->from;
}

static core_status check_equal(const declared *a, const declared *b) {
  char left[96], right[96];
  bool equal = a->dtype == b->dtype && a->rank == b->rank && memcmp(a->shape, b->shape, sizeof a->shape) == 0;
  CHECK(equal, CORE_ERR_INTERNAL, "tensor %s is %s %s on rank %d and %s %s on rank %d", a->name,
        core_dtype_text((core_dtype)a->dtype), ckpt_shape_text(a->rank, a->shape, left), a->from,
        core_dtype_text((core_dtype)b->dtype), ckpt_shape_text(b->rank, b->shape, right), b->from);
  return CORE_OK;
}

static core_status build(const declared *list, int64_t count, int32_t files, ckpt_manifest *m) {
  m->files = files;
  m->file = calloc((size_t)files, sizeof *m->file);
  m->item = calloc((size_t)count + 1, sizeof *m->item);
  m->part = calloc((size_t)count + 1, sizeof *m->part);
  CHECK(m->file != NULL && m->item != NULL && m->part != NULL, CORE_ERR_MEMORY,
        "no memory for a catalogue of %lld ranges", (long long)count);
  const declared *first = NULL; /* of the tensor at hand */
  for (int64_t i = 0; i < count; i++) {
    const declared *d = &list[i];
    if (first == NULL || strcmp(first->name, d->name) != 0) {
      ckpt_item *item = &m->item[m->items++];
      memcpy(item->name, d->name, sizeof item->name);
      memcpy(item->shape, d->shape, sizeof item->shape);
      item->dtype = (core_dtype)d->dtype;
      item->rank = d->rank;
      first = d;
    }
    TRY(check_equal(first, d));
    if (!d->owner || d->count == 0) continue;
    m->part[m->parts++] =
        (ckpt_part){.tensor = m->items - 1, .file = d->from, .first = d->first, .count = d->count};
  }
  return ckpt_manifest_link(m, CORE_ERR_INTERNAL, NULL);
}

static core_status declare_local(const ckpt_tensor *tensor, int32_t count, declared **out) {
  *out = calloc((size_t)count + 1, sizeof **out);
  CHECK(*out != NULL, CORE_ERR_MEMORY, "no memory to declare %d tensors", count);
  for (int32_t i = 0; i < count; i++) {
    const ckpt_tensor *t = &tensor[i];
    declared *d = &(*out)[i];
    TRY(ckpt_tensor_check(t));
    memcpy(d->name, t->name, strlen(t->name));
    for (int32_t s = 0; s < CORE_MAX_RANK; s++) d->shape[s] = s < t->rank ? t->shape[s] : 1;
    d->first = t->first;
    d->count = t->count;
    d->dtype = (int32_t)t->dtype;
    d->rank = t->rank;
    d->owner = t->owner;
  }
  return CORE_OK;
}

static core_status build_local(char *received, const int64_t *offset, int32_t ranks, ckpt_manifest *m) {
  declared *list = (declared *)received;
  int64_t count = offset[ranks] / (int64_t)sizeof *list;
  for (int32_t r = 0; r < ranks; r++) {
    for (int64_t i = offset[r] / (int64_t)sizeof *list; i < offset[r + 1] / (int64_t)sizeof *list; i++) {
      list[i].from = r;
    }
  }
  qsort(list, (size_t)count, sizeof *list, compare);
  TRY(build(list, count, ranks, m));
  return CORE_OK;
}

core_status ckpt_catalogue_gather(comm_group *control, const ckpt_tensor *tensor, int32_t count,
                                  ckpt_manifest *out) {
  declared *mine = NULL;
  char *received = NULL;
  int64_t *offset = NULL;
  core_status status, local = declare_local(tensor, count, &mine);
  *out = (ckpt_manifest){0};
  TRY_OUT(comm_agree(control, local), end);
  TRY_OUT(comm_gather_bytes(control, 0, mine, count * (int64_t)sizeof *mine, &received, &offset), end);
  local = comm_rank(control) == 0 ? build_local(received, offset, comm_size(control), out) : CORE_OK;
  TRY_OUT(comm_agree(control, local), end);
end:
  if (status != CORE_OK) ckpt_manifest_free(out);
  free(mine);
  free(received);
  free(offset);
  return status;
}
