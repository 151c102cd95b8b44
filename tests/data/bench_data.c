/* Streaming against its limit: the same files by threads that only pread and decompress.
 *
 *   bench_data                               writes a set and measures every filter
 *   bench_data DIRECTORY SPLIT MODALITY...   measures that one */
#include <stdio.h>
#include <stdlib.h>

#include "core/random.h"
#include "data_fixture.h"

static int print_ratio(const char *name, data_bench_options options) {
  data_bench_result result;
  options.rounds = 9;
  if (data_bench(&options, &result) != CORE_OK) {
    (void)fprintf(stderr, "%s\n", core_error_get()->message);
    return 1;
  }
  const double mib = (double)result.decoded_bytes / 1048576;
  (void)printf(
      "%-14s %-8s %d thread%s %7.1f MiB, %6.1f stored   limit %7.1f   stream %7.1f MiB/s   ratio %.3f   "
      "in processor time %.3f\n",
      name, options.shuffle_samples > 0 ? "shuffled" : "in order", options.threads,
      options.threads == 1 ? " " : "s", mib, (double)result.stored_bytes / 1048576,
      mib / result.limit_seconds, mib / result.stream_seconds, result.wall_ratio, result.processor_ratio);
  (void)fflush(stdout);
  return 0;
}

static int print_ratios(const char *name, data_bench_options options) {
  int failed = 0;
  for (options.shuffle_samples = 0; options.shuffle_samples <= 1024 && !failed;
       options.shuffle_samples += 1024)
    for (options.threads = 1; options.threads <= 2 && !failed; ++options.threads)
      failed = print_ratio(name, options);
  return failed;
}

/* Normal numbers rounded to 6 bits of mantissa: they compress about as encoder outputs do. */
static int write_set(const char *directory, data_filter filter) {
  enum { WIDTH = 768, ROWS = 16, SAMPLES = 1200, SHARDS = 4 };
  float *latent = malloc((size_t)WIDTH * ROWS * sizeof *latent);
  core_status status = latent == NULL ? CORE_ERR_MEMORY : CORE_OK;
  for (int32_t k = 0; status == CORE_OK && k < SHARDS; ++k) {
    data_writer *writer = NULL;
    const data_writer_options options = {.directory = directory,
                                         .modality = "image",
                                         .encoder = "none",
                                         .dtype = CORE_FLOAT16,
                                         .width = WIDTH,
                                         .shard = k,
                                         .filter = filter};
    status = data_writer_open(&options, &writer);
    for (int64_t i = 0; status == CORE_OK && i < SAMPLES; ++i) {
      const uint64_t id = (uint64_t)(k * SAMPLES + i);
      for (uint64_t j = 0; j < WIDTH * ROWS; ++j) {
        const uint64_t draw = core_random_u64(1, id % 64, j);
        latent[j] = (float)(int64_t)((draw & 127) - 64) / 32 * (float)(1 + (draw >> 7 & 3));
      }
      status = data_writer_add(writer, &(data_sample){.id = id, .latent = latent, .rows = ROWS, .label = -1});
    }
    if (status == CORE_OK) status = data_writer_close(writer);
  }
  free(latent);
  if (status != CORE_OK) (void)fprintf(stderr, "%s\n", core_error_get()->message);
  return status != CORE_OK;
}

int main(int count, char **arguments) {
  const char *const names[] = {"checksum", "gzip", "shuffle+gzip", "zstd", "shuffle+zstd"};
  const char *const image[] = {"image"};
  int failed = 0;
  if (count > 3)
    return print_ratios(arguments[2], (data_bench_options){.directory = arguments[1],
                                                           .split = arguments[2],
                                                           .modalities = (const char *const *)arguments + 3,
                                                           .modality_count = count - 3});
  for (int filter = DATA_FILTER_NONE; filter <= DATA_FILTER_SHUFFLE_ZSTD && !failed; ++filter) {
    char root[256], train[300];
    fixture_directory(root);
    (void)snprintf(train, sizeof train, "%s/train", root);
    failed = write_set(train, (data_filter)filter) ||
             print_ratios(names[filter],
                          (data_bench_options){
                              .directory = root, .split = "train", .modalities = image, .modality_count = 1});
    fixture_remove(root);
  }
  return failed;
}
