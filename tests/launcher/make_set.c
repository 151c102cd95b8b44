/* Makes latent sets for the tests of the command, sound ones and such that no writer of ours would make.
 *
 *   make_set directory=SPLIT [samples=48] [shards=2] [rows=4] [image=12] [text=9] [speech=0] [filter=none]
 *            [first=0] [absent=0] [shift=MODALITY] [nan=MODALITY] [nan_sample=0] [keys=0]
 *            [classes=0] [wrong=0] [unlabelled=0] [empty=-1] [unknown=0] [vocabulary=0]
 *            [carrier=image]
 *   make_set foreign=FILE     an HDF5 file that is not a shard
 *   make_set flip=FILE at=N   inverts the byte at N; negative: counted from the end
 *
 * image, text, speech: width, 0 for none. absent=k: every k-th sample lacks one modality in turn. shift: the
 * ids of that modality are one higher. keys=1: sample i has the key "sample-<i>". nan: one value of that
 * modality's sample is NaN. vocabulary: the shards of `carrier` carry prompts and responses of such tokens.
 *
 * classes: sample s is of class s mod classes, which its label tells and near whose own point its latents
 * lie. Of these, the first `wrong` carry the next class's label, every `unlabelled`-th has none, those of
 * class `empty` have no rows, and the last `unknown` are labelled with a class that is not there. */
#include <hdf5.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/random.h"
#include "tests/support/test_set.h"

static const float marker = 1234.5678F; /* no latent of ours has this value */

typedef struct options {
  int count;
  char **word;
} options;

static const char *text_of(const options *o, const char *key, const char *otherwise) {
  size_t length = strlen(key);
  for (int i = 0; i < o->count; i++)
    if (strncmp(o->word[i], key, length) == 0 && o->word[i][length] == '=') return o->word[i] + length + 1;
  return otherwise;
}

static int64_t number_of(const options *o, const char *key, int64_t otherwise) {
  const char *text = text_of(o, key, NULL);
  return text ? strtoll(text, NULL, 10) : otherwise;
}

static data_filter filter_of(const options *o) {
  static const char *const names[] = {"none", "gzip", "shuffle+gzip", "zstd", "shuffle+zstd"};
  for (int i = 0; i < 5; i++)
    if (strcmp(text_of(o, "filter", "none"), names[i]) == 0) return (data_filter)i;
  return DATA_FILTER_NONE;
}

static bool names(const options *o, const char *key, int32_t m) {
  return strcmp(text_of(o, key, ""), test_modality_names[m]) == 0;
}

static int64_t rows_of(const options *o, int64_t sample, int32_t m) {
  int64_t absent = number_of(o, "absent", 0), most = number_of(o, "rows", 4);
  if (absent > 0 && sample % absent == 0 && sample / absent % 3 == m) return 0;
  return 1 + (sample * 7 + m * 3) % most;
}

static int32_t label_of(const options *o, int64_t sample) {
  int64_t classes = number_of(o, "classes", 0), without = number_of(o, "unlabelled", 0);
  if (classes == 0 || (without > 0 && sample % without == without - 1)) return -1;
  if (sample >= number_of(o, "samples", 48) - number_of(o, "unknown", 0)) return 1000;
  return (int32_t)((sample + (sample < number_of(o, "wrong", 0))) % classes);
}

static core_status add_sample(const options *o, data_writer *writer, int32_t m, int64_t s, int64_t width) {
  int64_t rows = rows_of(o, s, m), classes = number_of(o, "classes", 0);
  if (classes > 0 && s % classes == number_of(o, "empty", -1)) rows = 0;
  float *latent = malloc((size_t)(rows * width + 1) * sizeof *latent);
  CHECK(latent, CORE_ERR_MEMORY, "no memory for a sample");
  uint64_t stream = core_random_stream(CORE_RANDOM_TEST, (uint64_t)m, (uint64_t)s);
  for (int64_t i = 0; i < rows * width; i++)
    latent[i] =
        (float)(3 * core_random_normal((uint64_t)number_of(o, "first", 0), stream, (uint64_t)i) + 0.5);
  uint64_t point =
      core_random_stream(CORE_RANDOM_TEST, 100 + (uint64_t)m, classes > 0 ? (uint64_t)(s % classes) : 0);
  for (int64_t i = 0; i < rows * width && classes > 0; i++)
    latent[i] = (float)(3 * core_random_normal(77, point, (uint64_t)(i % width))) + 0.03F * latent[i];
  if (names(o, "nan", m) && s == number_of(o, "nan_sample", 0)) latent[0] = marker;
  char key[32];
  snprintf(key, sizeof key, "sample-%lld", (long long)(number_of(o, "first", 0) + s));
  data_sample sample = {.id = (uint64_t)(number_of(o, "first", 0) + s + names(o, "shift", m)),
                        .key = number_of(o, "keys", 0) ? key : NULL,
                        .latent = latent,
                        .rows = rows,
                        .label = label_of(o, s)};
  int32_t prompt[TEST_MOST_TOKENS], target[TEST_MOST_TOKENS], V = (int32_t)number_of(o, "vocabulary", 0);
  if (V > 0 && strcmp(text_of(o, "carrier", test_modality_names[0]), test_modality_names[m]) == 0) {
    sample.prompt_count = test_set_prompt(s, V, 2, prompt);
    sample.target_count = test_set_target(s, V, target);
    sample.prompt = prompt;
    sample.target = target;
  }
  core_status status = data_writer_add(writer, &sample);
  free(latent);
  return status;
}

static core_status write_shard(const options *o, int32_t m, int64_t width, int64_t shard) {
  data_writer *writer = NULL;
  data_writer_options settings = {.directory = text_of(o, "directory", NULL),
                                  .modality = test_modality_names[m],
                                  .encoder = "test",
                                  .dtype = CORE_FLOAT32,
                                  .width = width,
                                  .shard = (int32_t)shard,
                                  .filter = filter_of(o)};
  int64_t samples = number_of(o, "samples", 48), shards = number_of(o, "shards", 2);
  TRY(data_writer_open(&settings, &writer));
  for (int64_t s = samples * shard / shards; s < samples * (shard + 1) / shards; s++) {
    core_status status = add_sample(o, writer, m, s, width);
    if (status != CORE_OK) {
      data_writer_abandon(writer);
      return status;
    }
  }
  TRY(data_writer_close(writer));
  return CORE_OK;
}

/* Replaces the marker by NaN. */
static core_status spoil(hid_t dataset, const char *path, bool *found) {
  hid_t space = H5Dget_space(dataset);
  hssize_t values = H5Sget_simple_extent_npoints(space);
  H5Sclose(space);
  float *latent = malloc((size_t)(values > 0 ? values : 1) * sizeof *latent);
  CHECK(latent && values >= 0, CORE_ERR_MEMORY, "no memory for %s", path);
  bool good = H5Dread(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, latent) >= 0;
  for (hssize_t i = 0; i < values; i++)
    if (latent[i] == marker) {
      latent[i] = NAN;
      *found = true;
    }
  if (*found) good = good && H5Dwrite(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, latent) >= 0;
  free(latent);
  CHECK(good, CORE_ERR_IO, "cannot change %s", path);
  return CORE_OK;
}

/* Our writer refuses NaN, so HDF5 writes it as another program would. */
static core_status place_nan(const char *directory, const char *modality, int64_t shards) {
  char path[4096];
  bool found = false;
  for (int64_t k = 0; k < shards && !found; k++) {
    snprintf(path, sizeof path, "%s/%s-%05d.h5", directory, modality, (int)k);
    hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
    hid_t dataset = file >= 0 ? H5Dopen2(file, "latent", H5P_DEFAULT) : -1;
    CHECK(dataset >= 0, CORE_ERR_IO, "cannot open %s", path);
    core_status status = spoil(dataset, path, &found);
    H5Dclose(dataset);
    H5Fclose(file);
    if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  CHECK(found, CORE_ERR_NOT_FOUND, "the marker is in no shard of '%s'", modality);
  return CORE_OK;
}

static core_status write_set(const options *o) {
  for (int32_t m = 0; m < 3; m++) {
    static const int64_t usual[3] = {12, 9, 0};
    int64_t width = number_of(o, test_modality_names[m], usual[m]), shards = number_of(o, "shards", 2);
    if (width == 0) continue;
    for (int64_t shard = 0; shard < shards; shard++) TRY(write_shard(o, m, width, shard));
    if (names(o, "nan", m)) TRY(place_nan(text_of(o, "directory", ""), test_modality_names[m], shards));
  }
  return CORE_OK;
}

static core_status write_foreign(const char *path) {
  hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  hid_t group = file >= 0 ? H5Gcreate2(file, "measurements", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT) : -1;
  CHECK(group >= 0, CORE_ERR_IO, "cannot write %s", path);
  H5Gclose(group);
  H5Fclose(file);
  return CORE_OK;
}

static core_status flip(const char *path, int64_t at) {
  FILE *file = fopen(path, "r+b");
  CHECK(file, CORE_ERR_IO, "cannot open %s", path);
  int whence = at < 0 ? SEEK_END : SEEK_SET;
  int byte = fseek(file, (long)at, whence) == 0 ? fgetc(file) : EOF;
  bool good = byte != EOF && fseek(file, (long)at, whence) == 0 && fputc(byte ^ 0xff, file) != EOF;
  CHECK(fclose(file) == 0 && good, CORE_ERR_IO, "cannot change byte %lld of %s", (long long)at, path);
  return CORE_OK;
}

int main(int argc, char **argv) {
  options o = {argc - 1, argv + 1};
  const char *foreign = text_of(&o, "foreign", NULL), *flipped = text_of(&o, "flip", NULL);
  core_status status = foreign   ? write_foreign(foreign)
                       : flipped ? flip(flipped, number_of(&o, "at", 0))
                                 : write_set(&o);
  if (status == CORE_OK) return 0;
  fprintf(stderr, "make_set: %s\n", core_error_get()->message);
  return 1;
}
