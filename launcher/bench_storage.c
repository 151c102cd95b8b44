/* antiphon bench data, antiphon bench checkpoint: the measuring is in data/ and checkpoint/. */
#include <stdio.h>

#include "checkpoint/checkpoint.h"
#include "core/clock.h"
#include "core/dims.h"
#include "core/file.h"
#include "data/data.h"
#include "launcher/bench.h"

static void print_data(const data_bench_options *o, const data_bench_result *r, bool json) {
  const double mb = (double)r->decoded_bytes / 1e6;
  if (json)
    printf(
        "{\"bench\": \"data\", \"path\": \"%s/%s\", \"order\": \"%s\", \"threads\": %d, \"rounds\": %d, "
        "\"samples\": %lld, \"decoded_mb\": %.1f, \"stored_mb\": %.1f, \"samples_s\": %.1f, \"mb_s\": %.1f, "
        "\"limit_mb_s\": %.1f, \"ratio\": %.4f, \"processor_ratio\": %.4f}\n",
        o->directory, o->split, o->shuffle_samples > 0 ? "shuffled" : "file", o->threads, o->rounds,
        (long long)r->samples, mb, (double)r->stored_bytes / 1e6, (double)r->samples / r->stream_seconds,
        mb / r->stream_seconds, mb / r->limit_seconds, r->wall_ratio, r->processor_ratio);
  else
    printf(
        "%s order, %d thread%s: %.1f MB stored, %.1f MB decoded; streamed at %.0f MB/s, read + decompress "
        "alone "
        "%.0f MB/s; of that limit %.3f by the clock, %.3f in processor time\n",
        o->shuffle_samples > 0 ? "shuffled" : "file", o->threads, o->threads == 1 ? "" : "s",
        (double)r->stored_bytes / 1e6, mb, mb / r->stream_seconds, mb / r->limit_seconds, r->wall_ratio,
        r->processor_ratio);
  fflush(stdout);
}

core_status launch_bench_data(comm_world *world, const launch_arguments *arguments) {
  enum { ROUNDS = 9, SHUFFLE = 1024 };
  char names[CORE_MAX_MODALITIES][CORE_NAME];
  const char *pointers[CORE_MAX_MODALITIES];
  data_bench_options o = {.split = arguments->split ? arguments->split : "train", .rounds = ROUNDS};
  CHECK(comm_size(comm_world_group(world)) == 1, CORE_ERR_USAGE, "bench data is for one rank");
  CHECK(arguments->positional_count == 2, CORE_ERR_USAGE,
        "usage: antiphon bench data DIRECTORY [--split NAME] [--json]");
  o.directory = arguments->positional[1];
  TRY(data_list_modalities(o.directory, o.split, names, &o.modality_count));
  for (int32_t m = 0; m < o.modality_count; m++) pointers[m] = names[m];
  o.modalities = pointers;
  for (o.shuffle_samples = 0; o.shuffle_samples <= SHUFFLE; o.shuffle_samples += SHUFFLE)
    for (o.threads = 1; o.threads <= 2; o.threads++) {
      data_bench_result result;
      TRY(data_bench(&o, &result));
      print_data(&o, &result, arguments->json);
    }
  return CORE_OK;
}

/* Every rank opens the set for itself and says how long it took. */
core_status launch_bench_open(comm_world *world, const launch_arguments *arguments) {
  char names[CORE_MAX_MODALITIES][CORE_NAME], index[4096];
  const char *pointers[CORE_MAX_MODALITIES], *split = arguments->split ? arguments->split : "train";
  int32_t count = 0;
  data_set *set = NULL;
  CHECK(arguments->positional_count == 2, CORE_ERR_USAGE,
        "usage: antiphon bench open DIRECTORY [--split NAME] [--json]");
  const char *directory = arguments->positional[1];
  TRY(data_list_modalities(directory, split, names, &count));
  for (int32_t m = 0; m < count; m++) pointers[m] = names[m];
  const double since = core_clock_now();
  TRY(data_set_open(directory, split, pointers, count, &set));
  const double seconds = core_clock_now() - since;
  snprintf(index, sizeof index, "%s/%s/shards.index", directory, split);
  printf(arguments->json ? "{\"bench\": \"open\", \"rank\": %d, \"shards\": %d, \"samples\": %lld, "
                           "\"index\": %s, \"seconds\": %.4f}\n"
                         : "rank %d: %d shards, %lld samples, with an index: %s, %.3f s\n",
         comm_rank(comm_world_group(world)), data_set_shards(set), (long long)data_set_samples(set),
         core_file_exists(index) ? "true" : "false", seconds);
  data_set_close(set);
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
