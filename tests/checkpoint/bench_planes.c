/* bench_planes CHECKPOINT: what each level of compression makes of a checkpoint's tensors, by kind (the part
 * of a name before its first '/'): stored size and speed of one thread in processor time. Not a test: it is
 * run by hand; the choice in checkpoint/README.md rests on it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "checkpoint/checkpoint_impl.h"

enum { KINDS = 16 };
static const int32_t levels[] = {-5, -1, 1, 2, 3, 6, 9, 15};

typedef struct kind {
  char name[CORE_NAME];
  ckpt_tensor *tensor; /* whole, float32 */
  int32_t count;
  int64_t bytes;
} kind;

typedef struct measured {
  size_t stored, plane[CKPT_PLANES];
  double encode, decode; /* seconds */
} measured;

static core_status add_tensor(ckpt_reader *reader, const ckpt_item *item, kind *k) {
  ckpt_tensor t;
  TRY(ckpt_reader_find(reader, item->name, &t));
  size_t bytes = (size_t)t.count * core_dtype_size(t.dtype);
  t.data = malloc(bytes + 1);
  k->tensor = realloc(k->tensor, ((size_t)k->count + 1) * sizeof t);
  CHECK(t.data != NULL && k->tensor != NULL, CORE_ERR_MEMORY, "no memory for %s", item->name);
  TRY(ckpt_reader_load(reader, &t, 1));
  k->tensor[k->count++] = t;
  k->bytes += (int64_t)bytes;
  return CORE_OK;
}

static core_status gather(ckpt_reader *reader, const char *path, kind kinds[KINDS], int32_t *count) {
  char *text;
  int64_t bytes;
  ckpt_manifest m;
  TRY(ckpt_manifest_text(path, &text, &bytes));
  core_status status = ckpt_manifest_take(path, text, bytes, &m);
  free(text);
  TRY(status);
  for (int32_t i = 0; i < m.items; i++) {
    const ckpt_item *item = &m.item[i];
    int32_t k = 0, length = (int32_t)strcspn(item->name, "/");
    if (item->dtype != CORE_FLOAT32 || item->count == 0) continue;
    while (k < *count && (strncmp(kinds[k].name, item->name, (size_t)length) != 0 || kinds[k].name[length]))
      k++;
    CHECK(k < KINDS, CORE_ERR_ARGUMENT, "more than %d kinds of tensors", KINDS);
    if (k == *count) snprintf(kinds[(*count)++].name, CORE_NAME, "%.*s", length, item->name);
    TRY(add_tensor(reader, item, &kinds[k]));
  }
  ckpt_manifest_free(&m);
  return CORE_OK;
}

static double processor_now(void) {
  return (double)clock() / CLOCKS_PER_SEC;
}

static core_status measure_tensor(ckpt_codec *codec, const ckpt_tensor *t, uint8_t *out, uint8_t *back,
                                  measured *r) {
  size_t size = core_dtype_size(t->dtype);
  for (int64_t done = 0; done < t->count; done += CKPT_CELL) {
    int64_t count = t->count - done < CKPT_CELL ? t->count - done : CKPT_CELL;
    const uint8_t *raw = (const uint8_t *)t->data + (size_t)done * size;
    ckpt_entry entry;
    double start = processor_now();
    TRY(ckpt_block_encode(codec, t->dtype, raw, count, out, &entry));
    double middle = processor_now();
    TRY(ckpt_block_decode(codec, t->dtype, &entry, out, count, back));
    r->encode += middle - start;
    r->decode += processor_now() - middle;
    r->stored += ckpt_entry_bytes(&entry);
    for (int p = 0; p < CKPT_PLANES; p++) r->plane[p] += entry.size[p];
  }
  return CORE_OK;
}

/* The best of three rounds. */
static core_status measure(const kind *k, int32_t level, uint8_t *memory, measured *best) {
  ckpt_codec codec;
  TRY(ckpt_codec_open(&codec, level, memory));
  for (int round = 0; round < 3; round++) {
    measured r = {0};
    for (int32_t t = 0; t < k->count; t++)
      TRY(measure_tensor(&codec, &k->tensor[t], memory + CKPT_BLOCK_BYTES,
                         memory + CKPT_BLOCK_BYTES + CKPT_STORED_BYTES, &r));
    if (round == 0) *best = r;
    if (r.encode < best->encode) best->encode = r.encode;
    if (r.decode < best->decode) best->decode = r.decode;
  }
  ckpt_codec_close(&codec);
  return CORE_OK;
}

/* For comparison: the elements as they lie, without planes. */
static core_status measure_plain(const kind *k, int32_t level, uint8_t *out) {
  ZSTD_CCtx *context = ZSTD_createCCtx();
  size_t stored = 0;
  double start = processor_now();
  for (int32_t t = 0; context != NULL && t < k->count; t++) {
    size_t bytes = (size_t)k->tensor[t].count * core_dtype_size(k->tensor[t].dtype);
    for (size_t done = 0; done < bytes; done += CKPT_CELL * 4) {
      size_t piece = bytes - done < CKPT_CELL * 4 ? bytes - done : CKPT_CELL * 4;
      size_t size = ZSTD_compressCCtx(context, out, CKPT_STORED_BYTES, (const char *)k->tensor[t].data + done,
                                      piece, level);
      CHECK(!ZSTD_isError(size), CORE_ERR_INTERNAL, "zstd: %s", ZSTD_getErrorName(size));
      stored += size;
    }
  }
  double seconds = processor_now() - start;
  (void)ZSTD_freeCCtx(context);
  printf("| %s | whole, zstd %d | %.3f | %.2f | |\n", k->name, level, (double)stored / (double)k->bytes,
         (double)k->bytes * 1e-9 / seconds);
  return CORE_OK;
}

static core_status report(const kind *k, uint8_t *memory) {
  for (size_t l = 0; l < sizeof levels / sizeof *levels; l++) {
    measured r = {0};
    TRY(measure(k, levels[l], memory, &r));
    printf("| %s | planes, level %d | %.3f | %.2f | %.2f |", k->name, levels[l],
           (double)r.stored / (double)k->bytes, (double)k->bytes * 1e-9 / r.encode,
           (double)k->bytes * 1e-9 / r.decode);
    for (int p = 0; p < 4; p++) printf(" %.3f", 4 * (double)r.plane[p] / (double)k->bytes);
    printf(" |\n");
  }
  TRY(measure_plain(k, 1, memory));
  TRY(measure_plain(k, 3, memory));
  return CORE_OK;
}

static core_status run(comm_group *control, const char *path) {
  ckpt_reader *reader;
  kind kinds[KINDS] = {{.count = 0}};
  int32_t count = 0;
  uint8_t *memory = malloc((size_t)CKPT_BLOCK_BYTES * 2 + CKPT_STORED_BYTES);
  CHECK(memory != NULL, CORE_ERR_MEMORY, "no memory for one block");
  TRY(ckpt_reader_open(control, path, &reader));
  TRY(gather(reader, path, kinds, &count));
  printf(
      "| tensors | stored as | size | GB/s out | GB/s in | planes, low to high "
      "|\n|---|---|---|---|---|---|\n");
  for (int32_t k = 0; k < count; k++) {
    TRY(report(&kinds[k], memory));
    for (int32_t t = 0; t < kinds[k].count; t++) free(kinds[k].tensor[t].data);
    free(kinds[k].tensor);
  }
  ckpt_reader_close(reader);
  free(memory);
  return CORE_OK;
}

int main(int count, char **argument) {
  comm_world *world;
  if (count != 2) {
    fprintf(stderr, "usage: %s CHECKPOINT\n", argument[0]);
    return 2;
  }
  if (comm_start(&(comm_options){.alone = true}, &world) != CORE_OK) return 1;
  core_status status = run(comm_control_group(world), argument[1]);
  if (status != CORE_OK) fprintf(stderr, "%s\n", core_error_get()->message);
  comm_finish(world);
  return status == CORE_OK ? 0 : 1;
}
