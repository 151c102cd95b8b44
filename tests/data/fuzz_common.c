#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/log.h"
#include "data/data.h"
#include "fuzz_target.h"

static char directory[64];

static int remove_entry(const char *path, const struct stat *about, int kind, struct FTW *where) {
  (void)about;
  (void)kind;
  (void)where;
  return remove(path);
}

static void remove_directory(void) {
  (void)nftw(directory, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

/* In memory where there is such a place: a file is written for every input. */
const char *fuzz_directory(void) {
  if (directory[0] != '\0') return directory;
  core_log_set_level(CORE_LOG_ERROR);
  (void)snprintf(directory, sizeof directory, "%s/antiphon-fuzz-XXXXXX",
                 access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  if (mkdtemp(directory) == NULL) abort();
  char train[80];
  (void)snprintf(train, sizeof train, "%s/train", directory);
  if (mkdir(train, 0777) != 0 || atexit(remove_directory) != 0) abort();
  return directory;
}

void fuzz_write(const char *path, const uint8_t *bytes, size_t count) {
  const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  if (fd < 0 || (count > 0 && write(fd, bytes, count) != (ssize_t)count)) abort();
  (void)close(fd);
}

int64_t fuzz_read(const char *path, uint8_t *out, int64_t capacity) {
  const int fd = open(path, O_RDONLY);
  const int64_t count = fd < 0 ? 0 : read(fd, out, (size_t)capacity);
  if (fd >= 0) (void)close(fd);
  return count;
}

void fuzz_stream(const char *root) {
  const char *const names[] = {"image"};
  const data_range range = {0, 8};
  data_set *set = NULL;
  data_stream *stream = NULL;
  data_stream_options options = {.batch = 8, .micro_batches = 1, .range = &range, .cache_bytes = 1 << 20};
  if (data_set_open(root, "train", names, 1, &set) != CORE_OK) return;
  for (options.order.shuffle_samples = 0; options.order.shuffle_samples <= 16;
       options.order.shuffle_samples += 16) {
    data_batch *batch = NULL;
    if (data_stream_open(set, &options, &stream) != CORE_OK) break;
    while (data_stream_get(stream, &batch) == CORE_OK && batch != NULL) data_stream_put(stream, batch);
    data_stream_close(stream);
  }
  data_set_close(set);
}
