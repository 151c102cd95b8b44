/* Fuzz target: an index beside a sound set. Its hashes are made right first, so that what lies behind them is
 * met. */
#include <stdio.h>
#include <string.h>

#include "core/random.h"
#include "data/index_impl.h"
#include "data_fixture.h"
#include "fuzz_target.h"

enum { SAMPLES = 40, MOST = 1 << 16 };

static void write_set(void) {
  static int written;
  char train[96];
  float latent[60] = {0};
  data_writer *writer = NULL;
  if (written++ > 0) return;
  (void)snprintf(train, sizeof train, "%s/train", fuzz_directory());
  const data_writer_options options = {
      .directory = train, .modality = "image", .encoder = "none", .dtype = CORE_FLOAT16, .width = 20};
  core_status status = data_writer_open(&options, &writer);
  for (uint64_t id = 0; status == CORE_OK && id < SAMPLES; ++id)
    status = data_writer_add(
        writer,
        &(data_sample){.id = id, .latent = latent, .rows = (int64_t)(id % 4), .label = (int32_t)(id % 3)});
  if (status == CORE_OK) status = data_writer_close(writer);
  if (status != CORE_OK) (void)fprintf(stderr, "%s\n", core_error_get()->message);
}

/* The hash of the table, and of the one block where it lies in a sound index. */
static void mend(uint8_t *bytes, size_t count) {
  data_index_footer footer;
  const size_t block = (size_t)data_index_block_bytes_priv(1, SAMPLES);
  if (count >= block) {
    const uint64_t hash = core_hash(bytes, block - 8, 0);
    memcpy(bytes + block - 8, &hash, sizeof hash);
  }
  if (count < sizeof footer) return;
  memcpy(&footer, bytes + count - sizeof footer, sizeof footer);
  const int64_t most = (int64_t)(count - sizeof footer);
  if (footer.table_at < 0 || footer.table_bytes < 0 || footer.table_at > most ||
      footer.table_bytes > most - footer.table_at)
    return;
  const uint64_t seed = core_hash(&footer, offsetof(data_index_footer, hash), 0);
  footer.hash = core_hash(bytes + footer.table_at, (size_t)footer.table_bytes, seed);
  memcpy(bytes + count - sizeof footer, &footer, sizeof footer);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count) {
  static uint8_t copy[MOST];
  char path[128];
  if (count > MOST) return 0;
  write_set();
  (void)snprintf(path, sizeof path, "%s/train/" DATA_INDEX_FILE, fuzz_directory());
  if (count > 0) memcpy(copy, bytes, count);
  mend(copy, count);
  fuzz_write(path, copy, count);
  fuzz_stream(fuzz_directory());
  return 0;
}

int64_t fuzz_seed(int index, uint8_t *out, int64_t capacity) {
  char path[128];
  data_index_result result;
  write_set();
  const data_index_options options = {
      .directory = fuzz_directory(), .split = "train", .check_values = index == 1};
  if (index > 1 || data_index_build(&options, &result) != CORE_OK) return 0;
  (void)snprintf(path, sizeof path, "%s/train/" DATA_INDEX_FILE, fuzz_directory());
  return fuzz_read(path, out, capacity);
}
