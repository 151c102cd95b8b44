/* Fuzz target: a latent shard, opened, streamed in file order and shuffled, and looked at. */
#include <stdio.h>

#include "data_craft.h"
#include "data_fixture.h"
#include "fuzz_target.h"

static void shard_path(char path[128]) {
  (void)snprintf(path, 128, "%s/train/image-00000.h5", fuzz_directory());
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count) {
  char path[128];
  FILE *nowhere = fopen("/dev/null", "w");
  shard_path(path);
  fuzz_write(path, bytes, count);
  fuzz_stream(fuzz_directory());
  if (nowhere != NULL && data_shard_describe(path, true, nowhere) != CORE_OK) core_error_clear();
  if (nowhere != NULL) (void)fclose(nowhere);
  return 0;
}

/* Every filter of our writer, then files in the styles of others. */
int64_t fuzz_seed(int index, uint8_t *out, int64_t capacity) {
  char path[128], train[96];
  shard_path(path);
  (void)snprintf(train, sizeof train, "%s/train", fuzz_directory());
  if (index <= DATA_FILTER_SHUFFLE_ZSTD) {
    const data_writer_options options = {.directory = train,
                                         .modality = "image",
                                         .encoder = "none",
                                         .dtype = CORE_FLOAT16,
                                         .width = 20,
                                         .filter = (data_filter)index};
    data_writer *writer = NULL;
    float latent[60];
    for (int i = 0; i < 60; ++i) latent[i] = (float)(i % 7);
    core_status status = data_writer_open(&options, &writer);
    for (uint64_t id = 0; status == CORE_OK && id < 40; ++id)
      status = data_writer_add(
          writer,
          &(data_sample){.id = id, .latent = latent, .rows = (int64_t)(id % 4), .label = 1, .key = "key"});
    if (status != CORE_OK || data_writer_close(writer) != CORE_OK) return 0;
    return fuzz_read(path, out, capacity);
  }
  craft c = craft_sound();
  c.gzip = index == 5;
  c.shuffle = index == 5;
  c.contiguous = index == 6;
  c.chunk_columns = index == 7 ? 2 : 0;
  c.checksum = index == 7;
  if (index > 7) return 0;
  craft_write(&c, path);
  return fuzz_read(path, out, capacity);
}
