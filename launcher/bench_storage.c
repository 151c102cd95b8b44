/* antiphon bench data, antiphon bench checkpoint: the measuring is in data/ and checkpoint/. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint.h"
#include "core/dims.h"
#include "data/data.h"
#include "launcher/bench.h"

/* Names of the modalities that have a shard 0 in a split. */
static int32_t list_modalities(const char *split, char names[CORE_MAX_MODALITIES][CORE_NAME]) {
  DIR *directory = opendir(split);
  int32_t count = 0;
  for (struct dirent *entry;
       directory && (entry = readdir(directory)) != NULL && count < CORE_MAX_MODALITIES;) {
    const char *tail = strstr(entry->d_name, "-00000.h5");
    if (!tail || tail == entry->d_name || tail - entry->d_name >= CORE_NAME) continue;
    snprintf(names[count++], CORE_NAME, "%.*s", (int)(tail - entry->d_name), entry->d_name);
  }
  if (directory) closedir(directory);
  return count;
}

core_status launch_bench_data(comm_world *world, const launch_arguments *arguments) {
  char split[2048], names[CORE_MAX_MODALITIES][CORE_NAME];
  const char *pointers[CORE_MAX_MODALITIES];
  CHECK(comm_size(comm_world_group(world)) == 1, CORE_ERR_USAGE, "bench data is for one rank");
  CHECK(arguments->positional_count == 2, CORE_ERR_USAGE,
        "usage: antiphon bench data DIRECTORY [--split NAME]");
  const char *name = arguments->split ? arguments->split : "train";
  snprintf(split, sizeof split, "%.1000s/%.900s", arguments->positional[1], name);
  int32_t count = list_modalities(split, names);
  CHECK(count > 0, CORE_ERR_NOT_FOUND, "%s holds no latent shards", split);
  for (int32_t m = 0; m < count; m++) pointers[m] = names[m];
  for (int32_t threads = 1; threads <= 2; threads++) {
    data_bench_result result;
    TRY(data_bench(arguments->positional[1], name, pointers, count, threads, 3, &result));
    printf(
        "%d thread%s: %.1f MB stored, %.1f MB decoded; streamed at %.0f MB/s, read + decompress alone %.0f "
        "MB/s: %.3f\n",
        threads, threads == 1 ? "" : "s", (double)result.stored_bytes / 1e6,
        (double)result.decoded_bytes / 1e6, (double)result.decoded_bytes / 1e6 / result.stream_seconds,
        (double)result.decoded_bytes / 1e6 / result.limit_seconds,
        result.limit_seconds / result.stream_seconds);
  }
  return CORE_OK;
}

core_status launch_bench_checkpoint(comm_world *world, const launch_arguments *arguments) {
  CHECK(comm_size(comm_world_group(world)) == 1, CORE_ERR_USAGE, "bench checkpoint is for one rank");
  CHECK(arguments->positional_count == 2, CORE_ERR_USAGE,
        "usage: antiphon bench checkpoint DIRECTORY [--json]");
  TRY(ckpt_bench(comm_control_group(world), arguments->positional[1], (int64_t)256 << 20,
                 arguments->json ? CKPT_BENCH_JSON : CKPT_BENCH_TABLE, stdout));
  return CORE_OK;
}
