/* Fuzz target: the files that packing reads. The first byte says which format the rest is. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/pack_impl.h"
#include "fuzz_target.h"

static void read_array(const char *path, const char *name) {
  data_array array;
  int64_t *values = NULL;
  uint8_t value[8];
  if (data_array_open_priv(path, name, &array) != CORE_OK) return;
  if (array.rank == 1 && data_array_count_priv(&array) <= 1 << 20 &&
      data_array_integers_priv(&array, 0, INT64_MAX, &values) != CORE_OK)
    values = NULL;
  free(values);
  const int64_t count = data_array_count_priv(&array);
  /* What was opened can be read to its last value. */
  if (count > 0 && data_array_read_priv(&array, count - 1, 1, value) != CORE_OK) abort();
  data_array_close_priv(&array);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count) {
  char path[128];
  if (count == 0) return 0;
  const int tensors = bytes[0] & 1;
  (void)snprintf(path, sizeof path, "%s/x%s", fuzz_directory(), tensors ? ".safetensors" : ".npy");
  fuzz_write(path, bytes + 1, count - 1);
  read_array(path, NULL);
  if (tensors) read_array(path, "a");
  return 0;
}

static int64_t seed_npy(const char *descr, const char *shape, int64_t data, uint8_t *out) {
  char header[118];
  const int used =
      snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }", descr, shape);
  memset(header + used, ' ', sizeof header - (size_t)used);
  header[sizeof header - 1] = '\n';
  memcpy(out, "\0\x93NUMPY\x01\0\x76\0", 11);
  memcpy(out + 11, header, sizeof header);
  memset(out + 11 + sizeof header, 0, (size_t)data);
  return 11 + (int64_t)sizeof header + data;
}

static int64_t seed_tensors(const char *header, int64_t data, uint8_t *out) {
  const size_t length = strlen(header);
  memset(out, 0, 9);
  out[0] = 1;
  out[1] = (uint8_t)length;
  memcpy(out + 9, header, length);
  memset(out + 9 + length, 0, (size_t)data);
  return 9 + (int64_t)length + data;
}

int64_t fuzz_seed(int index, uint8_t *out, int64_t capacity) {
  if (capacity < 4096) return 0;
  if (index == 0) return seed_npy("<f4", "(3, 4)", 48, out);
  if (index == 1) return seed_npy("<i8", "(5,)", 40, out);
  if (index == 2) return seed_npy("<f2", "(2, 3, 4)", 48, out);
  if (index == 3)
    return seed_tensors(
        "{\"a\":{\"dtype\":\"BF16\",\"shape\":[3,4],\"data_offsets\":[0,24]},"
        "\"offset\":{\"dtype\":\"I64\",\"shape\":[3],\"data_offsets\":[24,48]}}",
        48, out);
  if (index == 4)
    return seed_tensors(
        "{\"__metadata__\":{\"x\":\"y\"},\"a\":{\"dtype\":\"I32\",\"shape\":[6],\"data_offsets\":[0,24]}}",
        24, out);
  return 0;
}
