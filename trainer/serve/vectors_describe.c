/* A vectors file for a person: what it holds, and whether it is sound. */
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "trainer/serve/vectors.h"

bool train_vectors_is(const char *path) {
  char magic[16] = "";
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  bool is = pread(fd, magic, sizeof magic, 0) == (ssize_t)sizeof magic &&
            memcmp(magic, "antiphon-vectors", sizeof magic) == 0;
  close(fd);
  return is;
}

static void print_about(const train_vectors *v, FILE *out) {
  const train_vectors_about *about = train_vectors_info(v);
  char key[TRAIN_MOST_KEY + 1] = "";
  bool keyed = about->rows > 0 && train_vectors_key(v, 0, key) == CORE_OK && key[0];
  fprintf(out, "%s: %lld %s vectors", train_vectors_path(v), (long long)about->rows,
          train_vectors_kind_text(about->kind));
  if (about->toward[0])
    fprintf(out, " of %s:%s", about->modality, about->toward);
  else
    fprintf(out, " of %s", about->modality);
  fprintf(out, ", width %lld, %s, in %lld blocks%s%s\n", (long long)about->width,
          core_dtype_text(about->dtype), (long long)train_vectors_blocks(v),
          train_vectors_labels(v) ? ", with labels" : "", keyed ? ", with keys" : "");
  fprintf(out, "checkpoint: step %lld, content %016" PRIx64 "\n", (long long)about->step, about->checkpoint);
}

static core_status read_blocks(const train_vectors *v) {
  const train_vectors_about *about = train_vectors_info(v);
  int64_t blocks = train_vectors_blocks(v), most = 0;
  for (int64_t b = 0; b < blocks; b++) {
    int64_t rows = train_vectors_block_row(v, b + 1) - train_vectors_block_row(v, b);
    most = rows > most ? rows : most;
  }
  char *bytes = malloc((size_t)(most * about->width) * core_dtype_size(about->dtype) + 1);
  CHECK(bytes, CORE_ERR_MEMORY, "no memory for a block of %s", train_vectors_path(v));
  core_status status = CORE_OK;
  for (int64_t b = 0; b < blocks && status == CORE_OK; b++) status = train_vectors_read(v, b, b + 1, bytes);
  free(bytes);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

core_status train_vectors_describe(const char *path, bool deep, FILE *out) {
  train_vectors *v = NULL;
  TRY(train_vectors_open(path, &v));
  core_status status = deep ? read_blocks(v) : CORE_OK;
  if (status == CORE_OK && deep) fprintf(out, "%s: sound\n", path);
  if (status == CORE_OK && !deep) print_about(v, out);
  train_vectors_close(v);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}
