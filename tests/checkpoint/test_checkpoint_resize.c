/* A mixture of experts saved by some ranks and loaded by others: 1 to 8 ranks, experts over 1 to 8 of them,
 * unequal numbers of experts per layer, two placements, moments sharded or whole. Every pair of layouts; the
 * hash of the content is the same whoever wrote it; and a rank reads the blocks that it needs, and no other
 * byte. 8 ranks. */
#include "ckpt_fixture.h"

#include <stdio.h>
#include <stdlib.h>

#include "core/file.h"

enum { LAYERS = 4, MOST_EXPERTS = 8, KINDS = 3, SMALL = 977, LARGE = CKPT_CELL + 4099, GENERATION = 3 };
static const int32_t experts_of[LAYERS] = {0, 3, 8, 5}; /* layer 0 is dense */
static const char *const kind_name[KINDS] = {"parameter", "adam_m", "adam_v"};

typedef struct sized {
  const char *name;
  int32_t ranks, experts; /* experts: over so many ranks */
  bool partitioned, sharded;
} sized;

static const sized layouts[] = {
    {"one", 1, 1, false, false},           {"two-sharded", 2, 1, false, true},
    {"experts-2-of-6", 6, 2, true, true},  {"experts-3", 3, 3, true, true},
    {"eight-replicas", 8, 1, false, true}, {"experts-8", 8, 8, false, false},
    {"experts-4-of-8", 8, 4, true, true},
};
enum { LAYOUTS = sizeof layouts / sizeof *layouts };
#ifdef __SANITIZE_ADDRESS__ /* which makes it many times as long */
enum { PAIR_STRIDE = 3 };
#else
enum { PAIR_STRIDE = 1 };
#endif

/* ---- the model ---- */

typedef struct model_tensor {
  spec spec;
  int32_t kind, layer, expert; /* expert -1: on all ranks */
  char name[CORE_NAME];
} model_tensor;

static model_tensor tensors[KINDS * LAYERS * (MOST_EXPERTS + 1)];
static spec specs[KINDS * LAYERS * (MOST_EXPERTS + 1)];
static int32_t tensor_count;

static void add_tensor(int32_t kind, int32_t layer, int32_t expert) {
  model_tensor *t = &tensors[tensor_count];
  *t = (model_tensor){.kind = kind, .layer = layer, .expert = expert};
  if (expert < 0)
    snprintf(t->name, sizeof t->name, "%s/blocks.%d.norm", kind_name[kind], layer);
  else
    snprintf(t->name, sizeof t->name, "%s/blocks.%d.experts.%d.w", kind_name[kind], layer, expert);
  bool large = layer + expert == 1; /* layer 1's first expert; layer 2's norm */
  t->spec = (spec){t->name, CORE_FLOAT32, 1, {large ? LARGE : SMALL, 1, 1, 1}};
  specs[tensor_count++] = t->spec;
}

static int make_model(void **state) {
  for (int32_t kind = 0; kind < KINDS; kind++)
    for (int32_t layer = 0; layer < LAYERS; layer++)
      for (int32_t expert = -1; expert < experts_of[layer]; expert++) add_tensor(kind, layer, expert);
  return fixture_setup(state);
}

/* Which of the ranks hold a tensor: every `stride`-th from `first` on. */
static void holders(const sized *s, const model_tensor *t, int32_t *first, int32_t *stride) {
  *first = 0;
  *stride = 1;
  if (t->expert < 0) return;
  *stride = s->experts;
  *first =
      s->partitioned ? (t->expert + t->layer) % s->experts : t->expert * s->experts / experts_of[t->layer];
}

/* The ranges that a rank writes (saves) or needs. */
static layout ranges_of(const sized *s, int32_t rank, bool saves) {
  layout l = {NULL, 0};
  for (int32_t i = 0; i < tensor_count; i++) {
    const model_tensor *t = &tensors[i];
    int32_t first, stride;
    holders(s, t, &first, &stride);
    if (rank % stride != first % stride) continue;
    int64_t of = s->ranks / stride, turn = rank / stride, count = t->spec.shape[0],
            unit = saves ? CKPT_CELL : 1;
    bool cut = s->sharded && (saves || t->kind > 0);
    int64_t units = saves ? ckpt_cells(count) : count;
    int64_t begin = cut ? turn * units / of * unit : 0, end = cut ? (turn + 1) * units / of * unit : count;
    if (end > count) end = count;
    bool owner = saves && (cut || turn == 0);
    layout_add(&l, &t->spec, begin, end - begin, owner);
  }
  return l;
}

/* A group of the first `ranks` ranks; NULL on the others. */
static comm_group *some_ranks(const fixture *f, int32_t ranks) {
  comm_group *group;
  EXPECT_OK(comm_group_create(f->world, f->rank < ranks ? 0 : -1, "some", &group));
  return group;
}

static uint64_t save(const fixture *f, const sized *s, const char *directory) {
  uint64_t hash = 0;
  comm_group *group = some_ranks(f, s->ranks);
  if (group != NULL) {
    layout l = ranges_of(s, f->rank, true);
    const ckpt_options options = {.directory = directory};
    ckpt_writer *writer;
    ckpt_reader *reader;
    layout_fill(&l, specs, tensor_count, GENERATION);
    EXPECT_OK(ckpt_writer_create(group, &options, l.tensor, l.count, &writer));
    EXPECT_OK(ckpt_writer_begin(writer, 1, "{}"));
    EXPECT_OK(ckpt_writer_commit(writer));
    ckpt_writer_destroy(writer);
    EXPECT_OK(ckpt_reader_newest(group, directory, 1, &reader));
    hash = ckpt_reader_content_hash(reader);
    ckpt_reader_close(reader);
    layout_free(&l);
  }
  comm_group_destroy(group);
  return hash;
}

/* ---- bytes read ---- */

static void count_read(void *context, const core_file_event *event) {
  if (event->kind == CORE_FILE_READ && strstr(event->path, "rank-") != NULL)
    *(int64_t *)context += (int64_t)event->count;
}

static bool overlaps(const layout *l, const ckpt_item *item, int64_t first, int64_t count) {
  for (int32_t i = 0; i < l->count; i++) {
    const ckpt_tensor *t = &l->tensor[i];
    if (strcmp(t->name, item->name) == 0 && t->first < first + count && first < t->first + t->count)
      return true;
  }
  return false;
}

/* Of one file: its ends, its index, and the blocks that overlap what is wanted; 0 when none does. */
static int64_t bytes_of_file(const ckpt_manifest *m, const ckpt_rank_file *file, const layout *l) {
  int64_t blocks = 0;
  for (int64_t o = m->begin[file->number]; o < m->begin[file->number + 1]; o++) {
    const ckpt_part *part = &m->part[m->order[o]];
    for (int64_t cell = 0; cell < ckpt_cells(part->count); cell++) {
      int64_t left = part->count - cell * CKPT_CELL, count = left < CKPT_CELL ? left : CKPT_CELL;
      if (overlaps(l, &m->item[part->tensor], part->first + cell * CKPT_CELL, count))
        blocks += (int64_t)ckpt_entry_bytes(&file->entry[part->block + cell]);
    }
  }
  int64_t ends = (int64_t)(sizeof(ckpt_header) + sizeof(ckpt_trailer));
  return blocks == 0 ? 0 : blocks + ends + file->blocks * (int64_t)sizeof(ckpt_entry);
}

static int64_t bytes_needed(const char *path, const layout *l) {
  ckpt_manifest m;
  ckpt_rank_file file;
  char *text;
  int64_t count, bytes = 0;
  EXPECT_OK(ckpt_manifest_text(path, &text, &count));
  EXPECT_OK(ckpt_manifest_take(path, text, count, &m));
  free(text);
  for (int32_t f = 0; f < m.files; f++) {
    EXPECT_OK(ckpt_rank_file_open(path, &m, f, &file));
    bytes += bytes_of_file(&m, &file, l);
    ckpt_rank_file_close(&file);
  }
  ckpt_manifest_free(&m);
  return bytes;
}

static void load(const fixture *f, const sized *s, const char *directory, uint64_t hash) {
  comm_group *group = some_ranks(f, s->ranks);
  if (group != NULL) {
    layout l = ranges_of(s, f->rank, false);
    ckpt_reader *reader;
    int64_t read = 0;
    EXPECT_OK(ckpt_reader_newest(group, directory, 1, &reader));
    assert_true(ckpt_reader_content_hash(reader) == hash);
    core_file_observe(count_read, &read);
    EXPECT_OK(ckpt_reader_load(reader, l.tensor, l.count));
    core_file_observe(NULL, NULL);
    const char *wrong = layout_difference(&l, specs, tensor_count, GENERATION);
    if (wrong != NULL) fail_msg("%s to %s, rank %d: %s differs", directory, s->name, f->rank, wrong);
    assert_int_equal(read, bytes_needed(ckpt_reader_path(reader), &l));
    ckpt_reader_close(reader);
    layout_free(&l);
  }
  comm_group_destroy(group);
}

static void every_layout_loads_at_every_other(void **state) {
  const fixture *f = *state;
  char directory[LAYOUTS][CKPT_PATH];
  uint64_t hash[LAYOUTS];
  assert_int_equal(f->ranks, 8);
  for (int i = 0; i < LAYOUTS; i++) {
    fixture_directory(f, layouts[i].name, directory[i]);
    hash[i] = save(f, &layouts[i], directory[i]);
    EXPECT_OK(comm_broadcast(f->control, 0, &hash[i], sizeof hash[i]));
    assert_true(hash[i] == hash[0]);
  }
  for (int i = 0; i < LAYOUTS; i++)
    for (int j = i % PAIR_STRIDE; j < LAYOUTS; j += PAIR_STRIDE) load(f, &layouts[j], directory[i], hash[0]);
}

/* One of eight expert ranks reads a small part of the whole. */
static void a_rank_reads_its_part(void **state) {
  const fixture *f = *state;
  char path[CKPT_PATH];
  snprintf(path, sizeof path, "%s/one/step-00000001", f->directory);
  layout all = ranges_of(&layouts[0], 0, false), part = ranges_of(&layouts[5], f->rank, false);
  int64_t whole = bytes_needed(path, &all), needed = bytes_needed(path, &part), file;
  char name[CKPT_PATH + 32];
  snprintf(name, sizeof name, "%s/rank-00000.ckpt", path);
  EXPECT_OK(core_file_size(name, &file));
  assert_int_equal(whole, file); /* all of it, once */
  if (f->rank > 0) assert_true(needed < whole * 2 / 3);
  EXPECT_OK(comm_barrier(f->control));
  layout_free(&all);
  layout_free(&part);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_layout_loads_at_every_other),
      cmocka_unit_test(a_rank_reads_its_part),
  };
  return cmocka_run_group_tests(tests, make_model, fixture_teardown);
}
