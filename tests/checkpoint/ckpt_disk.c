/* Outline: every event becomes an operation on numbered nodes (files and directories), because names move.
 * A crash state is a replay of those operations that are safe, or that the choice lets through. */
#include "ckpt_disk.h"

#include "ckpt_fixture.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "core/file.h"
#include "core/random.h"

enum { ROOT = 0, NOBODY = -1, NODES = 1024, ENTRIES = 1024, FILES = 1024, NAME = 64, SECTOR = 16 };

typedef enum op_kind { ADD, MOVE, REMOVE, TRUNCATE, WRITE, SYNC } op_kind;

typedef struct op {
  op_kind kind;
  int node;                  /* what the operation is on; of a sync, what becomes safe */
  int directory;             /* of the name(s) */
  char name[NAME], to[NAME]; /* to: of a move, within the directory */
  size_t offset, count;
  uint8_t *bytes; /* [count] */
} op;

typedef struct entry {
  int directory, node; /* node NOBODY: a free place */
  char name[NAME];
} entry;

/* The names of all directories at one moment. */
typedef struct tree {
  entry entry[ENTRIES];
  int entries;
} tree;

struct disk {
  pthread_mutex_t lock;
  char root[512];
  tree now;
  bool is_directory[NODES];
  int nodes;
  struct {
    int node;
    size_t offset;
  } open[FILES]; /* by descriptor */
  op *op;
  int64_t ops, capacity, base; /* base: operations that made what was there at the beginning */
};

/* ---- names ---- */

static entry *tree_find(tree *t, int directory, const char *name) {
  for (int e = 0; e < t->entries; e++) {
    entry *found = &t->entry[e];
    if (found->node != NOBODY && found->directory == directory && strcmp(found->name, name) == 0)
      return found;
  }
  return NULL;
}

static void tree_set(tree *t, int directory, const char *name, int node) {
  entry *found = tree_find(t, directory, name);
  if (found == NULL) {
    assert_true(t->entries < ENTRIES);
    found = &t->entry[t->entries++];
  }
  *found = (entry){.directory = directory, .node = node};
  snprintf(found->name, NAME, "%s", name);
}

/* Does what an operation does to names; false when the name no longer means the same node. */
static bool tree_apply(tree *t, const op *o) {
  entry *found = tree_find(t, o->directory, o->name);
  if (o->kind == ADD) {
    tree_set(t, o->directory, o->name, o->node);
    return true;
  }
  if (found == NULL || found->node != o->node) return false;
  found->node = NOBODY;
  if (o->kind == MOVE) tree_set(t, o->directory, o->to, o->node);
  return true;
}

/* Splits a path under the root into its directory's node and its last name. NOBODY: it is not under it. */
static int resolve_parent(disk *d, const char *path, char name[NAME]) {
  size_t length = strlen(d->root);
  int directory = NOBODY;
  name[0] = 0;
  if (strncmp(path, d->root, length) != 0 || (path[length] != '/' && path[length] != 0)) return NOBODY;
  for (const char *at = path + length; *at == '/';) {
    size_t span = strcspn(++at, "/");
    if (strncmp(at, "..", span < 2 ? 2 : span) == 0)
      return NOBODY; /* of the checkpoints: the root, or outside */
    const entry *inside = name[0] ? tree_find(&d->now, directory, name) : NULL;
    directory = directory == NOBODY ? ROOT : inside ? inside->node : NOBODY;
    assert_int_not_equal(directory, NOBODY);
    snprintf(name, NAME, "%.*s", (int)span, at);
    at += span;
  }
  return directory;
}

static int resolve(disk *d, const char *path) {
  char name[NAME];
  if (strcmp(path, d->root) == 0) return ROOT;
  int directory = resolve_parent(d, path, name);
  const entry *found = directory == NOBODY ? NULL : tree_find(&d->now, directory, name);
  return found == NULL ? NOBODY : found->node;
}

/* ---- recording ---- */

static void record(disk *d, op o) {
  if (d->ops == d->capacity) {
    d->capacity = 2 * d->capacity + 64;
    d->op = realloc(d->op, (size_t)d->capacity * sizeof *d->op);
    assert_non_null(d->op);
  }
  if (o.kind == ADD || o.kind == MOVE || o.kind == REMOVE) assert_true(tree_apply(&d->now, &o));
  if (o.kind == WRITE) {
    const uint8_t *bytes = o.bytes;
    o.bytes = malloc(o.count + 1);
    assert_non_null(o.bytes);
    if (o.count > 0) memcpy(o.bytes, bytes, o.count);
  }
  d->op[d->ops++] = o;
}

static int record_new(disk *d, const char *path, bool is_directory) {
  op o = {.kind = ADD};
  o.directory = resolve_parent(d, path, o.name);
  if (o.directory == NOBODY) return NOBODY;
  assert_true(d->nodes < NODES);
  o.node = d->nodes++;
  d->is_directory[o.node] = is_directory;
  record(d, o);
  return o.node;
}

static void record_name(disk *d, op_kind kind, const char *path, const char *to) {
  op o = {.kind = kind, .node = resolve(d, path)};
  if (o.node == NOBODY) return;
  o.directory = resolve_parent(d, path, o.name);
  if (to != NULL) assert_int_equal(resolve_parent(d, to, o.to), o.directory);
  record(d, o);
}

static void record_open(disk *d, const core_file_event *event) {
  int node = resolve(d, event->path);
  if (node == NOBODY && (event->flags & O_CREAT)) node = record_new(d, event->path, false);
  if (node != NOBODY && (event->flags & O_TRUNC)) record(d, (op){.kind = TRUNCATE, .node = node});
  assert_in_range(event->fd, 0, FILES - 1);
  d->open[event->fd].node = node;
  d->open[event->fd].offset = 0;
}

static void record_write(disk *d, const core_file_event *event) {
  int node = d->open[event->fd].node;
  if (node == NOBODY) return;
  record(d, (op){.kind = WRITE,
                 .node = node,
                 .offset = d->open[event->fd].offset,
                 .count = event->count,
                 .bytes = (uint8_t *)(uintptr_t)event->bytes});
  d->open[event->fd].offset += event->count;
}

static void on_event(void *context, const core_file_event *event) {
  disk *d = context;
  pthread_mutex_lock(&d->lock);
  switch (event->kind) {
    case CORE_FILE_OPEN:
      record_open(d, event);
      break;
    case CORE_FILE_WRITE:
      record_write(d, event);
      break;
    case CORE_FILE_SYNC:
      if (d->open[event->fd].node != NOBODY) record(d, (op){.kind = SYNC, .node = d->open[event->fd].node});
      break;
    case CORE_FILE_RENAME:
      record_name(d, MOVE, event->path, event->to);
      break;
    case CORE_FILE_REMOVE:
    case CORE_FILE_REMOVE_DIRECTORY:
      record_name(d, REMOVE, event->path, NULL);
      break;
    case CORE_FILE_MAKE_DIRECTORY:
      if (resolve(d, event->path) == NOBODY) (void)record_new(d, event->path, true);
      break;
    default:
      break;
  }
  pthread_mutex_unlock(&d->lock);
}

/* What lies under a directory already, as operations. */
static void record_tree(disk *d, const char *path) {
  char child[1024];
  struct stat info;
  DIR *stream = opendir(path);
  assert_non_null(stream);
  for (const struct dirent *e = readdir(stream); e != NULL; e = readdir(stream)) {
    if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
    snprintf(child, sizeof child, "%s/%s", path, e->d_name);
    assert_int_equal(stat(child, &info), 0);
    int node = record_new(d, child, S_ISDIR(info.st_mode));
    if (S_ISDIR(info.st_mode)) {
      record_tree(d, child);
      continue;
    }
    size_t count;
    char *bytes = slurp(child, &count);
    record(d, (op){.kind = WRITE, .node = node, .count = count, .bytes = (uint8_t *)bytes});
    free(bytes);
  }
  closedir(stream);
}

disk *disk_watch(const char *root) {
  disk *d = calloc(1, sizeof *d);
  assert_non_null(d);
  pthread_mutex_init(&d->lock, NULL);
  snprintf(d->root, sizeof d->root, "%s", root);
  d->is_directory[ROOT] = true;
  d->nodes = 1;
  record_tree(d, root);
  d->base = d->ops;
  core_file_observe(on_event, d);
  return d;
}

void disk_stop(disk *d) {
  (void)d;
  core_file_observe(NULL, NULL);
}

int64_t disk_operations(disk *d) {
  pthread_mutex_lock(&d->lock);
  int64_t count = d->ops - d->base;
  pthread_mutex_unlock(&d->lock);
  return count;
}

void disk_free(disk *d) {
  for (int64_t i = 0; i < d->ops; i++)
    if (d->op[i].kind == WRITE) free(d->op[i].bytes);
  free(d->op);
  pthread_mutex_destroy(&d->lock);
  free(d);
}

/* ---- crash states ---- */

typedef struct content {
  uint8_t *bytes;
  size_t count, capacity;
} content;

typedef struct crash {
  const disk *d;
  int64_t end;
  disk_fate names, data;
  uint64_t seed, draw;
  tree tree;
  content file[NODES];
  const op *skipped[ENTRIES]; /* on names */
  int skips;
} crash;

static uint64_t pick(crash *c, uint64_t below) {
  return core_random_below(c->seed, core_random_stream(CORE_RANDOM_TEST, 5, 0), c->draw++, below);
}

static bool is_safe(const crash *c, int64_t at) {
  const op *o = &c->d->op[at];
  int node = o->kind == WRITE || o->kind == TRUNCATE ? o->node : o->directory;
  if (at < c->d->base) return true;
  for (int64_t later = at + 1; later < c->end; later++)
    if (c->d->op[later].kind == SYNC && c->d->op[later].node == node) return true;
  return false;
}

static bool share_a_name(const op *a, const op *b) {
  if (a->directory != b->directory) return false;
  if (strcmp(a->name, b->name) == 0 || strcmp(a->name, b->to) == 0) return true;
  return a->to[0] && (strcmp(a->to, b->name) == 0 || strcmp(a->to, b->to) == 0);
}

static void replay_name(crash *c, int64_t at) {
  const op *o = &c->d->op[at];
  bool kept = is_safe(c, at) || c->names == DISK_KEPT || (c->names == DISK_MIXED && pick(c, 2) == 0);
  for (int s = 0; s < c->skips; s++)
    if (share_a_name(c->skipped[s], o)) kept = false;
  if (kept) kept = tree_apply(&c->tree, o);
  if (kept) return;
  assert_true(c->skips < ENTRIES);
  c->skipped[c->skips++] = o;
}

static void put(content *file, size_t offset, const uint8_t *bytes, size_t count) {
  size_t end = offset + count;
  if (end > file->capacity) {
    file->bytes = realloc(file->bytes, 2 * end);
    assert_non_null(file->bytes);
    memset(file->bytes + file->capacity, 0, 2 * end - file->capacity);
    file->capacity = 2 * end;
  }
  if (count > 0 && bytes != NULL) memcpy(file->bytes + offset, bytes, count);
  if (end > file->count) file->count = end;
}

/* The file has its new length, and some of the sectors never came. */
static void put_torn(crash *c, content *file, const op *o) {
  put(file, o->offset, NULL, o->count);
  for (size_t at = 0; at < o->count; at += SECTOR) {
    size_t count = o->count - at < SECTOR ? o->count - at : SECTOR;
    if (pick(c, 2) == 0) put(file, o->offset + at, o->bytes + at, count);
  }
}

static void replay_write(crash *c, int64_t at) {
  const op *o = &c->d->op[at];
  content *file = &c->file[o->node];
  uint64_t choice = is_safe(c, at) || c->data == DISK_KEPT ? 0 : c->data == DISK_LOST ? 1 : pick(c, 4);
  if (choice == 0) put(file, o->offset, o->bytes, o->count);
  if (choice == 2) put(file, o->offset, o->bytes, pick(c, o->count + 1));
  if (choice == 3) put_torn(c, file, o);
}

static void replay_truncate(crash *c, int64_t at) {
  content *file = &c->file[c->d->op[at].node];
  if (is_safe(c, at) || c->data == DISK_KEPT || (c->data == DISK_MIXED && pick(c, 2) == 0)) {
    if (file->count > 0) memset(file->bytes, 0, file->count);
    file->count = 0;
  }
}

static void replay(crash *c) {
  for (int64_t at = 0; at < c->end; at++) {
    switch (c->d->op[at].kind) {
      case WRITE:
        replay_write(c, at);
        break;
      case TRUNCATE:
        replay_truncate(c, at);
        break;
      case SYNC:
        break;
      default:
        replay_name(c, at);
    }
  }
}

static void write_out(const crash *c, int directory, const char *path) {
  char child[1024];
  assert_int_equal(mkdir(path, 0777), 0);
  for (int e = 0; e < c->tree.entries; e++) {
    const entry *found = &c->tree.entry[e];
    if (found->node == NOBODY || found->directory != directory) continue;
    snprintf(child, sizeof child, "%s/%s", path, found->name);
    if (c->d->is_directory[found->node])
      write_out(c, found->node, child);
    else
      spit(child, c->file[found->node].bytes, c->file[found->node].count);
  }
}

void disk_materialise(const disk *d, int64_t operations, disk_fate names, disk_fate data, uint64_t seed,
                      const char *target) {
  crash *c = calloc(1, sizeof *c);
  assert_non_null(c);
  c->d = d;
  c->end = d->base + operations;
  c->names = names;
  c->data = data;
  c->seed = seed;
  replay(c);
  remove_tree(target);
  write_out(c, ROOT, target);
  for (int n = 0; n < d->nodes; n++) free(c->file[n].bytes);
  free(c);
}
