#include "golden_case.h"

#include <hdf5.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* A whole dataset as `type`, malloc'ed; *count: its numbers. */
static void *read_all(hid_t group, const char *name, hid_t type, int64_t *count) {
  hid_t set = H5Dopen2(group, name, H5P_DEFAULT);
  assert_true(set >= 0);
  hid_t space = H5Dget_space(set);
  *count = H5Sget_simple_extent_npoints(space);
  void *values = calloc((size_t)*count + 1, H5Tget_size(type));
  assert_non_null(values);
  if (*count > 0) assert_true(H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0);
  H5Sclose(space);
  H5Dclose(set);
  return values;
}

static void read_attribute(hid_t group, const char *name, hid_t type, size_t bytes, void *out) {
  hid_t attribute = H5Aopen(group, name, H5P_DEFAULT);
  assert_true(attribute >= 0);
  hid_t space = H5Aget_space(attribute);
  assert_int_equal((size_t)H5Sget_simple_extent_npoints(space) * H5Tget_size(type), bytes);
  assert_true(H5Aread(attribute, type, out) >= 0);
  H5Sclose(space);
  H5Aclose(attribute);
}

static char *read_text(hid_t group, const char *name) {
  hid_t attribute = H5Aopen(group, name, H5P_DEFAULT), type = H5Aget_type(attribute);
  size_t bytes = H5Tget_size(type);
  char *text = calloc(bytes + 1, 1);
  assert_non_null(text);
  read_attribute(group, name, type, bytes, text);
  H5Tclose(type);
  H5Aclose(attribute);
  return text;
}

static void place(golden_case *golden, int64_t values) {
  golden->first = calloc((size_t)golden->parameters, sizeof *golden->first);
  assert_non_null(golden->first);
  int64_t total = 0;
  for (int64_t i = 0; i < golden->parameters; i++) {
    golden->first[i] = total;
    total += golden->size[i];
  }
  assert_int_equal(total, values);
}

golden_case *golden_read(const char *path, const char *name) {
  golden_case *golden = calloc(1, sizeof *golden);
  assert_non_null(golden);
  hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
  assert_true(file >= 0);
  hid_t group = H5Gopen2(file, name, H5P_DEFAULT);
  assert_true(group >= 0);
  int64_t bytes, values, same;
  golden->config = read_text(group, "config");
  read_attribute(group, "consumed", H5T_NATIVE_INT64, sizeof golden->consumed, &golden->consumed);
  read_attribute(group, "scalars", H5T_NATIVE_DOUBLE, sizeof golden->scalar, &golden->scalar);
  if (H5Aexists(group, "balance") > 0)
    read_attribute(group, "balance", H5T_NATIVE_DOUBLE, sizeof golden->balance, &golden->balance);
  golden->name = read_all(group, "names", H5T_NATIVE_CHAR, &bytes);
  golden->size = read_all(group, "sizes", H5T_NATIVE_INT64, &golden->parameters);
  assert_int_equal(bytes, golden->parameters * GOLDEN_NAME);
  golden->value = read_all(group, "value", H5T_NATIVE_FLOAT, &values);
  golden->gradient = read_all(group, "gradient", H5T_NATIVE_DOUBLE, &same);
  assert_int_equal(same, values);
  golden->update = read_all(group, "update", H5T_NATIVE_DOUBLE, &same);
  assert_int_equal(same, values);
  golden->update_two = read_all(group, "update_two", H5T_NATIVE_DOUBLE, &same);
  assert_int_equal(same, values);
  golden->pair = read_all(group, "pair", H5T_NATIVE_DOUBLE, &golden->pair_count);
  golden->sums = read_all(group, "sums", H5T_NATIVE_DOUBLE, &golden->sum_count);
  golden->counts = read_all(group, "counts", H5T_NATIVE_INT64, &golden->count_count);
  golden->embedding = read_all(group, "embedding", H5T_NATIVE_DOUBLE, &golden->embedding_count);
  place(golden, values);
  H5Gclose(group);
  H5Fclose(file);
  return golden;
}

void golden_free(golden_case *golden) {
  if (!golden) return;
  void *const parts[] = {golden->config, golden->name,     golden->size,   golden->first,
                         golden->value,  golden->gradient, golden->update, golden->update_two,
                         golden->pair,   golden->sums,     golden->counts, golden->embedding};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
  free(golden);
}

int64_t golden_find(const golden_case *golden, const char *name) {
  for (int64_t i = 0; i < golden->parameters; i++)
    if (strncmp(golden->name[i], name, GOLDEN_NAME) == 0) return i;
  return -1;
}
