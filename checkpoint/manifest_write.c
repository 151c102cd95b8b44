/* The catalogue of a checkpoint: what both sides derive from it, its hashes, and its text. */
#include <stdlib.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY /* XXH64_state_t on the stack */
#include <xxhash.h>

#include "checkpoint/checkpoint_impl.h"

void ckpt_manifest_free(ckpt_manifest *manifest) {
  free(manifest->meta);
  free(manifest->file);
  free(manifest->item);
  free(manifest->part);
  free(manifest->order);
  free(manifest->begin);
  *manifest = (ckpt_manifest){0};
}

int64_t ckpt_cells(int64_t count) {
  return count / CKPT_CELL + (count % CKPT_CELL != 0);
}

int64_t ckpt_shape_count(core_dtype dtype, int32_t rank, const int64_t *shape) {
  int64_t count = 1, bytes;
  for (int32_t d = 0; d < rank; d++) {
    if (shape[d] < 0 || __builtin_mul_overflow(count, shape[d], &count)) return -1;
  }
  if (__builtin_mul_overflow(count, (int64_t)core_dtype_size(dtype), &bytes)) return -1;
  return bytes > (int64_t)1 << 62 ? -1 : count;
}

/* No blanks, quotes, backslashes or control characters: names need no escaping anywhere. */
bool ckpt_name_valid(const char *name) {
  size_t length = strnlen(name, CORE_NAME);
  if (length == 0 || length >= CORE_NAME) return false;
  for (size_t i = 0; i < length; i++) {
    unsigned char c = (unsigned char)name[i];
    if (c <= 0x20 || c == '"' || c == '\\' || c == 0x7f) return false;
  }
  return true;
}

const char *ckpt_shape_text(int32_t rank, const int64_t *shape, char out[96]) {
  int used = snprintf(out, 96, "[");
  for (int32_t d = 0; d < rank; d++) {
    used += snprintf(out + used, 96 - (size_t)used, "%s%lld", d == 0 ? "" : ", ", (long long)shape[d]);
  }
  snprintf(out + used, 96 - (size_t)used, "]");
  return out;
}

/* ---- derived members ---- */

/* Parts lie in the order (tensor, first); each must begin where the one before it ends. */
static core_status link_item(ckpt_manifest *m, int32_t number, core_status code, int64_t *next) {
  ckpt_item *item = &m->item[number];
  int64_t covered = 0;
  char shape[96];
  item->part = *next;
  for (; *next < m->parts && m->part[*next].tensor == number; ++*next) {
    const ckpt_part *part = &m->part[*next];
    CHECK(part->file >= 0 && part->file < m->files, code, "tensor %s: file number %d, expected below %d",
          item->name, part->file, m->files);
    CHECK(part->first >= covered, code, "tensor %s: element %lld is covered twice", item->name,
          (long long)part->first);
    CHECK(part->first == covered, code, "tensor %s: elements %lld to %lld are covered by no rank", item->name,
          (long long)covered, (long long)part->first - 1);
    CHECK(part->first % CKPT_CELL == 0, code, "tensor %s: a range begins at %lld, not a multiple of %d",
          item->name, (long long)part->first, CKPT_CELL);
    CHECK(part->count > 0 && part->count <= item->count - covered, code,
          "tensor %s: a range of %lld elements at %lld is outside the shape %s", item->name,
          (long long)part->count, (long long)part->first, ckpt_shape_text(item->rank, item->shape, shape));
    covered += part->count;
  }
  item->parts = *next - item->part;
  CHECK(covered == item->count, code, "tensor %s: elements %lld to %lld are covered by no rank", item->name,
        (long long)covered, (long long)item->count - 1);
  return CORE_OK;
}

static core_status link_items(ckpt_manifest *m, core_status code) {
  int64_t next = 0;
  for (int32_t i = 0; i < m->items; i++) {
    ckpt_item *item = &m->item[i];
    CHECK(ckpt_name_valid(item->name), code, "tensor %d has an invalid name", i);
    CHECK(i == 0 || strcmp(m->item[i - 1].name, item->name) < 0, code,
          "tensor %s is listed twice or out of order", item->name);
    item->count = ckpt_shape_count(item->dtype, item->rank, item->shape);
    CHECK(item->count >= 0, code, "tensor %s has an impossible shape", item->name);
    TRY(link_item(m, i, code, &next));
  }
  CHECK(next == m->parts, code, "%lld of %lld ranges belong to no tensor", (long long)(m->parts - next),
        (long long)m->parts);
  return CORE_OK;
}

core_status ckpt_manifest_link(ckpt_manifest *m, core_status code, int64_t *blocks) {
  TRY(link_items(m, code));
  m->order = calloc((size_t)m->parts + 1, sizeof *m->order);
  m->begin = calloc((size_t)m->files + 2, sizeof *m->begin);
  int64_t *filled = calloc((size_t)m->files + 1, sizeof *filled);
  if (m->order == NULL || m->begin == NULL || filled == NULL) {
    free(filled);
    FAIL(CORE_ERR_MEMORY, "no memory for a catalogue of %lld ranges", (long long)m->parts);
  }
  for (int64_t p = 0; p < m->parts; p++) m->begin[m->part[p].file + 1]++;
  for (int32_t f = 0; f < m->files; f++) m->begin[f + 1] += m->begin[f];
  for (int64_t p = 0; p < m->parts; p++) {
    ckpt_part *part = &m->part[p];
    part->block = filled[part->file];
    filled[part->file] += ckpt_cells(part->count);
  }
  if (blocks != NULL) memcpy(blocks, filled, (size_t)m->files * sizeof *blocks);
  memset(filled, 0, (size_t)m->files * sizeof *filled);
  for (int64_t p = 0; p < m->parts; p++) {
    int32_t f = m->part[p].file;
    m->order[m->begin[f] + filled[f]++] = p;
  }
  free(filled);
  return CORE_OK;
}

/* ---- hashes ---- */

uint64_t ckpt_item_hash(const ckpt_manifest *m, const ckpt_item *item, ckpt_cell_hash hash_of,
                        const void *context) {
  XXH64_state_t state;
  (void)XXH64_reset(&state, 0);
  for (int64_t p = item->part; p < item->part + item->parts; p++) {
    int64_t cells = ckpt_cells(m->part[p].count);
    for (int64_t cell = 0; cell < cells; cell++) {
      uint64_t hash = hash_of(context, &m->part[p], cell);
      (void)XXH64_update(&state, &hash, sizeof hash);
    }
  }
  return XXH64_digest(&state);
}

uint64_t ckpt_content_hash(const ckpt_manifest *m) {
  XXH64_state_t state;
  char line[CORE_NAME + 160], shape[96];
  (void)XXH64_reset(&state, 0);
  for (int32_t i = 0; i < m->items; i++) {
    const ckpt_item *item = &m->item[i];
    int length = snprintf(line, sizeof line, "%s %s %s %016llx\n", item->name, core_dtype_text(item->dtype),
                          ckpt_shape_text(item->rank, item->shape, shape), (unsigned long long)item->hash);
    (void)XXH64_update(&state, line, (size_t)length);
  }
  return XXH64_digest(&state);
}

/* ---- text ---- */

static void print_string(FILE *out, const char *text) {
  fputc('"', out);
  for (const unsigned char *c = (const unsigned char *)text; *c != 0; c++) {
    if (*c < 0x20) {
      fprintf(out, "\\u%04x", *c);
      continue;
    }
    if (*c == '"' || *c == '\\') fputc('\\', out);
    fputc(*c, out);
  }
  fputc('"', out);
}

static void print_item(FILE *out, const ckpt_manifest *m, const ckpt_item *item) {
  fprintf(out, "{\"name\":\"%s\",\"dtype\":\"%s\",\"shape\":[", item->name, core_dtype_text(item->dtype));
  for (int32_t d = 0; d < item->rank; d++) {
    fprintf(out, "%s\"%lld\"", d == 0 ? "" : ",", (long long)item->shape[d]);
  }
  fprintf(out, "],\"hash\":\"%016llx\",\"parts\":[", (unsigned long long)item->hash);
  for (int64_t p = item->part; p < item->part + item->parts; p++) {
    fprintf(out, "%s[%d,\"%lld\",\"%lld\"]", p == item->part ? "" : ",", m->part[p].file,
            (long long)m->part[p].first, (long long)m->part[p].count);
  }
  fprintf(out, "]}");
}

static void print_manifest(FILE *out, const ckpt_manifest *m) {
  fprintf(out,
          "{\"format\":\"" CKPT_FORMAT "\",\n\"version\":%d,\n\"step\":\"%lld\",\n\"meta\":", CKPT_VERSION,
          (long long)m->step);
  print_string(out, m->meta);
  fprintf(out, ",\n\"content_hash\":\"%016llx\",\n\"files\":[", (unsigned long long)m->content_hash);
  for (int32_t f = 0; f < m->files; f++) {
    fprintf(
        out,
        "%s\n{\"name\":\"rank-%05d.ckpt\",\"bytes\":\"%lld\",\"blocks\":\"%lld\",\"index_hash\":\"%016llx\"}",
        f == 0 ? "" : ",", f, (long long)m->file[f].bytes, (long long)m->file[f].blocks,
        (unsigned long long)m->file[f].index_hash);
  }
  fprintf(out, "],\n\"tensors\":[");
  for (int32_t i = 0; i < m->items; i++) {
    fprintf(out, "%s\n", i == 0 ? "" : ",");
    print_item(out, m, &m->item[i]);
  }
  fprintf(out, "]");
}

core_status ckpt_manifest_print(const ckpt_manifest *manifest, char **text, size_t *count) {
  *text = NULL;
  FILE *out = open_memstream(text, count);
  CHECK(out != NULL, CORE_ERR_MEMORY, "no memory for the text of a manifest");
  print_manifest(out, manifest);
  /* The hash of all that lies before it, in a tail of fixed form: no bit of the file is unguarded. */
  bool failed = fflush(out) != 0;
  if (!failed) {
    fprintf(out, ",\n\"hash\":\"%016llx\"}\n", (unsigned long long)XXH64(*text, *count, 0));
  }
  failed = failed || ferror(out) != 0;
  if (fclose(out) != 0 || failed) {
    free(*text);
    *text = NULL;
    FAIL(CORE_ERR_MEMORY, "no memory for the text of a manifest");
  }
  return CORE_OK;
}
