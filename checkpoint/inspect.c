/* Looking at a checkpoint and checking it, in one process. */
#include <cJSON.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint_impl.h"
#include "core/file.h"

static const double MIB = 1048576.0;

bool ckpt_is(const char *path) {
  static const char begin[] = "{\"format\":\"" CKPT_FORMAT "\"";
  char file[CKPT_PATH], found[sizeof begin - 1];
  int fd = -1;
  bool is = false;
  core_error saved;
  core_error_save(&saved); /* "no" is an answer here, not a failure */
  if (ckpt_path(file, "%s/" CKPT_MANIFEST, path) == CORE_OK && core_file_exists(file) &&
      core_file_open(file, O_RDONLY, &fd) == CORE_OK) {
    is = core_file_read_at(fd, file, found, sizeof found, 0) == CORE_OK &&
         memcmp(found, begin, sizeof found) == 0;
    if (core_file_close(fd, file) != CORE_OK) is = false;
  }
  (void)core_error_restore(&saved);
  return is;
}

static core_status read_manifest(const char *path, ckpt_manifest *out) {
  char *text;
  int64_t count;
  *out = (ckpt_manifest){0};
  TRY(ckpt_manifest_text(path, &text, &count));
  core_status status = ckpt_manifest_take(path, text, count, out);
  free(text);
  TRY(status);
  return CORE_OK;
}

static int64_t stored_bytes(const ckpt_manifest *m) {
  int64_t sum = 0;
  for (int32_t f = 0; f < m->files; f++) sum += m->file[f].bytes;
  return sum;
}

static double raw_bytes(const ckpt_manifest *m) {
  double sum = 0;
  for (int32_t i = 0; i < m->items; i++)
    sum += (double)m->item[i].count * (double)core_dtype_size(m->item[i].dtype);
  return sum;
}

/* Texts of several lines (a configuration) are indented under their name. */
static void describe_text(const char *name, const char *text, FILE *out) {
  if (text == NULL) return;
  bool lines = strchr(text, '\n') != NULL;
  fprintf(out, "%s%s", name, lines ? "\n    " : ": ");
  for (; *text; text++) {
    fputc(*text, out);
    if (*text == '\n' && text[1]) fputs("    ", out);
  }
  if (!lines) fputc('\n', out);
}

static void describe_meta(const char *meta, FILE *out) {
  cJSON *object = cJSON_Parse(meta), *field = NULL;
  if (!cJSON_IsObject(object)) fprintf(out, "meta %s\n", meta);
  cJSON_ArrayForEach(field, object) {
    char *other = cJSON_IsString(field) ? NULL : cJSON_PrintUnformatted(field);
    describe_text(field->string ? field->string : "meta", other ? other : cJSON_GetStringValue(field), out);
    cJSON_free(other);
  }
  cJSON_Delete(object);
}

core_status ckpt_describe(const char *path, FILE *out) {
  ckpt_manifest m;
  char shape[96];
  TRY(read_manifest(path, &m));
  fprintf(out, "checkpoint %s\nstep %lld, %d tensors, %.2f MiB in %d files of %.2f MiB, content %016llx\n",
          path, (long long)m.step, m.items, raw_bytes(&m) / MIB, m.files, (double)stored_bytes(&m) / MIB,
          (unsigned long long)m.content_hash);
  describe_meta(m.meta, out);
  for (int32_t i = 0; i < m.items; i++) {
    const ckpt_item *item = &m.item[i];
    fprintf(out, "%-56s %-8s %-24s %016llx, %lld part%s\n", item->name, core_dtype_text(item->dtype),
            ckpt_shape_text(item->rank, item->shape, shape), (unsigned long long)item->hash,
            (long long)item->parts, item->parts == 1 ? "" : "s");
  }
  ckpt_manifest_free(&m);
  return CORE_OK;
}

static core_status verify_files(const char *path, const ckpt_manifest *m, FILE *out) {
  for (int32_t f = 0; f < m->files; f++) {
    TRY(ckpt_rank_file_verify(path, m, f, 1, NULL));
    if (out != NULL) {
      fprintf(out, "rank-%05d.ckpt: %lld blocks, %.2f MiB, sound\n", f, (long long)m->file[f].blocks,
              (double)m->file[f].bytes / MIB);
    }
  }
  TRY(ckpt_verify_hashes(path, m));
  return CORE_OK;
}

core_status ckpt_verify(const char *path, FILE *out) {
  ckpt_manifest m;
  TRY(read_manifest(path, &m));
  core_status status = verify_files(path, &m, out);
  if (status == CORE_OK && out != NULL) {
    fprintf(out, "%s: sound: step %lld, %d tensors, content %016llx\n", path, (long long)m.step, m.items,
            (unsigned long long)m.content_hash);
  }
  ckpt_manifest_free(&m);
  TRY(status);
  return CORE_OK;
}
