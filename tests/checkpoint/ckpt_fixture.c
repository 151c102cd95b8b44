#include "ckpt_fixture.h"

#include <dirent.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/log.h"
#include "core/random.h"

#define LONG_NAME \
  "adam_m/blocks.11.experts.1023.a_name_that_takes_every_byte_that_a_name_may_take_012345678901234"

const spec all_specs[] = {
    {"f32/cells", CORE_FLOAT32, 1, {3 * CKPT_CELL + 17}},
    {"f32/odd", CORE_FLOAT32, 2, {5, 7}},
    {"f32/zeros", CORE_FLOAT32, 2, {CKPT_CELL / 64, 64}},
    {"bf16/cells", CORE_BFLOAT16, 3, {2, CKPT_CELL / 8 + 1, 8}},
    {"f16/one", CORE_FLOAT16, 1, {CKPT_CELL}},
    {"f64/cells", CORE_FLOAT64, 1, {CKPT_CELL + 1}},
    {"i32", CORE_INT32, 1, {1001}},
    {"i64", CORE_INT64, 1, {3}},
    {"u64", CORE_UINT64, 4, {2, 2, 2, 2}},
    {"u8/cells", CORE_UINT8, 1, {2 * CKPT_CELL + 5}},
    {"scalar", CORE_FLOAT32, 0, {0}},
    {"empty", CORE_FLOAT32, 2, {0, 4}},
    {LONG_NAME, CORE_INT64, 1, {1}},
};
const int32_t all_specs_count = sizeof all_specs / sizeof *all_specs;

const spec tiny_specs[] = {
    {"w", CORE_FLOAT32, 2, {4, 5}},   {"b", CORE_BFLOAT16, 1, {33}},    {"runs", CORE_FLOAT32, 1, {90}},
    {"position", CORE_INT64, 1, {3}}, {"scalar", CORE_FLOAT64, 0, {0}},
};
const int32_t tiny_specs_count = sizeof tiny_specs / sizeof *tiny_specs;

_Static_assert(sizeof LONG_NAME == CORE_NAME, "the longest name possible");

/* ---- world and files ---- */

void expect_ok(core_status status, const char *file, int line) {
  if (status != CORE_OK) fail_msg("%s:%d: %s", file, line, core_error_get()->message);
}

/* Memory-backed where there is room: thousands of saves would wait for a disk's fsync. */
static const char *scratch_of(bool small) {
  struct statvfs info;
  const char *base = getenv("TMPDIR");
  if (small && statvfs("/dev/shm", &info) == 0 && access("/dev/shm", W_OK) == 0 &&
      info.f_bavail * info.f_frsize > (unsigned long)32 << 20) {
    return "/dev/shm";
  }
  return base == NULL ? "/tmp" : base;
}

static int setup(void **state, bool small) {
  fixture *f = calloc(1, sizeof *f);
  if (f == NULL || comm_start(&(comm_options){.deadline = 60}, &f->world) != CORE_OK) return -1;
  f->control = comm_control_group(f->world);
  f->rank = comm_rank(f->control);
  f->ranks = comm_size(f->control);
  snprintf(f->directory, sizeof f->directory, "%.200s/antiphon-ckpt-XXXXXX", scratch_of(small));
  if (f->rank == 0 && mkdtemp(f->directory) == NULL) return -1;
  if (comm_broadcast(f->control, 0, f->directory, sizeof f->directory) != CORE_OK) return -1;
  core_log_set_level(CORE_LOG_ERROR); /* the warnings are wanted here */
  *state = f;
  return 0;
}

int fixture_setup(void **state) {
  return setup(state, false);
}

int fixture_setup_small(void **state) {
  return setup(state, true);
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *walk) {
  (void)info;
  (void)kind;
  (void)walk;
  return remove(path);
}

void remove_tree(const char *path) {
  (void)nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

int fixture_teardown(void **state) {
  fixture *f = *state;
  core_status status = comm_barrier(f->control);
  if (f->rank == 0) remove_tree(f->directory);
  comm_finish(f->world);
  free(f);
  return status == CORE_OK ? 0 : -1;
}

void fixture_directory(const fixture *f, const char *name, char out[CKPT_PATH]) {
  snprintf(out, CKPT_PATH, "%s/%s", f->directory, name);
}

static int compare_text(const void *left, const void *right) {
  return strcmp(*(char *const *)left, *(char *const *)right);
}

void list_names(const char *directory, char *out, size_t capacity) {
  char *name[256];
  size_t count = 0, used = 0;
  DIR *stream = opendir(directory);
  assert_non_null(stream);
  for (const struct dirent *entry = readdir(stream); entry != NULL; entry = readdir(stream)) {
    assert_true(count < 256);
    if (entry->d_name[0] != '.') name[count++] = strdup(entry->d_name);
  }
  closedir(stream);
  if (count > 0) qsort(name, count, sizeof *name, compare_text);
  out[0] = 0;
  for (size_t i = 0; i < count; i++) {
    used += (size_t)snprintf(out + used, capacity - used, "%s%s", i == 0 ? "" : " ", name[i]);
    assert_true(used < capacity);
    free(name[i]);
  }
}

char *slurp(const char *path, size_t *count) {
  FILE *in = fopen(path, "rb");
  if (in == NULL) fail_msg("cannot open %s", path);
  assert_int_equal(fseek(in, 0, SEEK_END), 0);
  *count = (size_t)ftell(in);
  rewind(in);
  char *bytes = malloc(*count + 1);
  assert_non_null(bytes);
  assert_int_equal(fread(bytes, 1, *count, in), *count);
  bytes[*count] = 0;
  fclose(in);
  return bytes;
}

void spit(const char *path, const void *bytes, size_t count) {
  FILE *out = fopen(path, "wb");
  if (out == NULL) fail_msg("cannot open %s", path);
  assert_int_equal(fwrite(bytes, 1, count, out), count);
  assert_int_equal(fclose(out), 0);
}

/* ---- contents ---- */

static bool has(const char *name, const char *part) {
  return strstr(name, part) != NULL;
}

/* Random bits, so that NaNs of every kind occur; zeros; or long runs. */
static void element(const spec *s, uint64_t generation, int64_t index, uint8_t *out) {
  uint64_t value = core_random_u64(generation, core_hash_text(s->name), (uint64_t)index);
  if (has(s->name, "zeros")) value = 0;
  if (has(s->name, "runs")) value = generation + (uint64_t)index / 30;
  memcpy(out, &value, core_dtype_size(s->dtype));
}

static const spec *spec_of(const ckpt_tensor *t, const spec *specs, int32_t count) {
  for (int32_t i = 0; i < count; i++) {
    if (strcmp(specs[i].name, t->name) == 0) return &specs[i];
  }
  fail_msg("no tensor %s", t->name);
  return NULL;
}

void layout_fill(const layout *l, const spec *specs, int32_t count, uint64_t generation) {
  for (int32_t i = 0; i < l->count; i++) {
    const ckpt_tensor *t = &l->tensor[i];
    const spec *s = spec_of(t, specs, count);
    size_t size = core_dtype_size(t->dtype);
    for (int64_t e = 0; e < t->count; e++) {
      element(s, generation, t->first + e, (uint8_t *)t->data + (size_t)e * size);
    }
  }
}

const char *layout_difference(const layout *l, const spec *specs, int32_t count, uint64_t generation) {
  for (int32_t i = 0; i < l->count; i++) {
    const ckpt_tensor *t = &l->tensor[i];
    const spec *s = spec_of(t, specs, count);
    size_t size = core_dtype_size(t->dtype);
    uint8_t expected[8];
    for (int64_t e = 0; e < t->count; e++) {
      element(s, generation, t->first + e, expected);
      if (memcmp(expected, (uint8_t *)t->data + (size_t)e * size, size) != 0) return t->name;
    }
  }
  return NULL;
}

/* ---- layouts ---- */

void layout_add(layout *l, const spec *s, int64_t first, int64_t count, bool owner) {
  size_t bytes = (size_t)count * core_dtype_size(s->dtype);
  l->tensor = realloc(l->tensor, ((size_t)l->count + 1) * sizeof *l->tensor);
  assert_non_null(l->tensor);
  ckpt_tensor *t = &l->tensor[l->count++];
  *t = (ckpt_tensor){.name = s->name, .dtype = s->dtype, .rank = s->rank, .first = first, .count = count};
  memcpy(t->shape, s->shape, sizeof t->shape);
  t->owner = owner;
  t->data = malloc(bytes + 1);
  assert_non_null(t->data);
  memset(t->data, 0xa5, bytes + 1);
}

layout layout_make(const spec *specs, int32_t count, int64_t cells, int32_t shift, int32_t rank,
                   int32_t ranks) {
  layout l = {NULL, 0};
  for (int32_t s = 0; s < count; s++) {
    int64_t all = ckpt_shape_count(specs[s].dtype, specs[s].rank, specs[s].shape);
    int64_t stride = cells == 0 ? all : cells * CKPT_CELL, range = 0;
    if (all == 0) layout_add(&l, &specs[s], 0, 0, true);
    for (int64_t first = 0; first < all; first += stride, range++) {
      int64_t left = all - first;
      if ((range + s + shift) % ranks != rank) continue;
      layout_add(&l, &specs[s], first, left < stride ? left : stride, true);
    }
  }
  return l;
}

layout layout_full(const spec *specs, int32_t count) {
  layout l = {NULL, 0};
  for (int32_t s = 0; s < count; s++) {
    layout_add(&l, &specs[s], 0, ckpt_shape_count(specs[s].dtype, specs[s].rank, specs[s].shape), false);
  }
  return l;
}

void layout_free(layout *l) {
  for (int32_t i = 0; i < l->count; i++) free(l->tensor[i].data);
  free(l->tensor);
  *l = (layout){NULL, 0};
}

/* ---- saving and loading ---- */

core_status save_step(const fixture *f, ckpt_writer *writer, const layout *l, const spec *specs,
                      int32_t count, int64_t step, uint64_t generation) {
  char meta[64];
  (void)f;
  layout_fill(l, specs, count, generation);
  snprintf(meta, sizeof meta, "{\"generation\": %llu}", (unsigned long long)generation);
  TRY(ckpt_writer_begin(writer, step, meta));
  TRY(ckpt_writer_commit(writer));
  return CORE_OK;
}

int64_t load_newest(const fixture *f, const char *directory, const spec *specs, int32_t count, uint64_t one,
                    uint64_t other) {
  ckpt_reader *reader;
  EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
  if (reader == NULL) return -1;
  layout full = layout_full(specs, count);
  EXPECT_OK(ckpt_reader_load(reader, full.tensor, full.count));
  if (layout_difference(&full, specs, count, one) != NULL) {
    assert_null(layout_difference(&full, specs, count, other));
  }
  int64_t step = ckpt_reader_step(reader);
  ckpt_reader_close(reader);
  layout_free(&full);
  return step;
}

bool child_crashed(pid_t child) {
  enum { CRASHED = 137 }; /* core_file_inject */
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  if (WEXITSTATUS(status) != 0) assert_int_equal(WEXITSTATUS(status), CRASHED);
  return WEXITSTATUS(status) == CRASHED;
}
