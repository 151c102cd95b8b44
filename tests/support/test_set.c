#include "tests/support/test_set.h"

#include <ftw.h>
#include <limits.h> /* PATH_MAX */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/random.h"

const char *const test_modality_names[3] = {"image", "text", "speech"};

static int32_t draw_token(int64_t s, int64_t i, int32_t vocabulary) {
  uint64_t stream = core_random_stream(CORE_RANDOM_TEST, 99, (uint64_t)s);
  return (int32_t)core_random_below(5, stream, (uint64_t)i, (uint64_t)vocabulary);
}

int64_t test_set_prompt(int64_t s, int32_t vocabulary, int32_t modalities, int32_t token[TEST_MOST_TOKENS]) {
  int64_t count = 0, words = s % 4 == 1 ? 0 : s % 5;
  if (s % 5 == 3) token[count++] = -1;
  for (int64_t i = 0; i < words; i++) token[count++] = draw_token(s, i, vocabulary);
  if (s % 3 == 2 && modalities > 1) token[count++] = -2;
  if (s % 4 == 2) token[count++] = draw_token(s, 50, vocabulary);
  return count;
}

int64_t test_set_target(int64_t s, int32_t vocabulary, int32_t token[TEST_MOST_TOKENS]) {
  int64_t count = 1 + s % 7;
  for (int64_t i = 0; i < count; i++) token[i] = draw_token(s, 100 + i, vocabulary);
  return count;
}

static core_status add_sample(data_writer *writer, const test_set_options *o, int32_t m, int64_t s) {
  int64_t rows = o->rows(s, m), width = o->width[m];
  float *latent = malloc((size_t)(rows * width + 1) * sizeof *latent);
  CHECK(latent, CORE_ERR_MEMORY, "no memory for a sample");
  uint64_t stream = core_random_stream(CORE_RANDOM_TEST, (uint64_t)m, (uint64_t)s);
  for (int64_t i = 0; i < rows * width; i++)
    latent[i] = (float)(3 * core_random_normal(o->first_id, stream, (uint64_t)i) + 0.5);
  data_sample sample = {.id = o->first_id + (uint64_t)s,
                        .latent = latent,
                        .rows = rows,
                        .label = o->labels && s % 3 < 2 ? (int32_t)(s / 3) : -1};
  int32_t prompt[TEST_MOST_TOKENS], target[TEST_MOST_TOKENS];
  if (o->vocabulary > 0 && m == 0) {
    sample.prompt_count = test_set_prompt(s, o->vocabulary, o->modalities, prompt);
    sample.target_count = test_set_target(s, o->vocabulary, target);
    sample.prompt = prompt;
    sample.target = target;
  }
  core_status status = data_writer_add(writer, &sample);
  free(latent);
  return status;
}

static core_status write_shard(const test_set_options *o, int32_t m, int32_t shard) {
  data_writer *writer = NULL;
  data_writer_options options = {.directory = o->directory,
                                 .modality = test_modality_names[m],
                                 .encoder = "test",
                                 .dtype = CORE_FLOAT32,
                                 .width = o->width[m],
                                 .shard = shard};
  TRY(data_writer_open(&options, &writer));
  for (int64_t s = o->samples * shard / o->shards; s < o->samples * (shard + 1) / o->shards; s++) {
    core_status status = add_sample(writer, o, m, s);
    if (status != CORE_OK) {
      data_writer_abandon(writer);
      return status;
    }
  }
  TRY(data_writer_close(writer));
  return CORE_OK;
}

core_status test_set_write(const test_set_options *options) {
  for (int32_t m = 0; m < options->modalities; m++)
    for (int32_t shard = 0; shard < options->shards; shard++) TRY(write_shard(options, m, shard));
  return CORE_OK;
}

static core_status write_train(const test_set_options *options, char *root) {
  char path[PATH_MAX];
  test_set_options own = *options;
  CHECK(mkdtemp(root), CORE_ERR_IO, "no directory %s", root);
  snprintf(path, sizeof path, "%s/train", root);
  own.directory = path;
  TRY(test_set_write(&own));
  return CORE_OK;
}

core_status test_set_share(comm_world *job, const test_set_options *options, char *root, size_t capacity) {
  comm_group *control = comm_control_group(job);
  TRY(comm_agree(control, comm_rank(control) == 0 ? write_train(options, root) : CORE_OK));
  TRY(comm_broadcast(control, 0, root, (int64_t)capacity));
  return CORE_OK;
}

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *walk) {
  (void)info, (void)type, (void)walk;
  return remove(path);
}

void test_remove_tree(const char *path) {
  (void)nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}
