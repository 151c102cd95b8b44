#include "data_craft.h"

#include <hdf5.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const int64_t sound_id[4] = {5, 3, 9, 100};
static const int64_t sound_offset[5] = {0, 2, 2, 5, 6};
static const int64_t sound_label[4] = {1, -1, 7, 7};
static const float sound_latent[18] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, -1, -2, -3, 0, 0.5f, -0.5f};

craft craft_sound(void) {
  return (craft){.format = "antiphon-latents",
                 .modality = "image",
                 .encoder = "by hand",
                 .dtype = "float32",
                 .version = 1,
                 .width = 3,
                 .samples = 4,
                 .rows = 6,
                 .columns = 3,
                 .id = sound_id,
                 .offset = sound_offset,
                 .label = sound_label,
                 .latent = sound_latent,
                 .chunk_rows = 4};
}

static bool left_out(const craft *c, const char *name) {
  return c->left_out != NULL && strcmp(c->left_out, name) == 0;
}

static void put_text(const craft *c, hid_t file, const char *name, const char *value) {
  if (left_out(c, name) || value == NULL) return;
  const bool variable = c->text == CRAFT_VARIABLE_UTF8 || c->text == CRAFT_VARIABLE_ASCII;
  const hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
  char fixed[41];
  H5Tset_size(type, variable ? H5T_VARIABLE : 40);
  if (c->text == CRAFT_VARIABLE_UTF8) H5Tset_cset(type, H5T_CSET_UTF8);
  if (!variable) H5Tset_strpad(type, c->text == CRAFT_FIXED_SPACE ? H5T_STR_SPACEPAD : H5T_STR_NULLPAD);
  const hid_t id = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  memset(fixed, c->text == CRAFT_FIXED_SPACE ? ' ' : 0, sizeof fixed);
  memcpy(fixed, value, strlen(value));
  assert_true(H5Awrite(id, type, variable ? (const void *)&value : fixed) >= 0);
  H5Aclose(id);
  H5Sclose(space);
  H5Tclose(type);
}

static void put_number(const craft *c, hid_t file, const char *name, int64_t value) {
  if (left_out(c, name)) return;
  const hid_t space = H5Screate(H5S_SCALAR);
  const hid_t id = H5Acreate2(file, name, c->small_integers ? H5T_STD_U16BE : H5T_STD_I64LE, space,
                              H5P_DEFAULT, H5P_DEFAULT);
  assert_true(H5Awrite(id, H5T_NATIVE_INT64, &value) >= 0);
  H5Aclose(id);
  H5Sclose(space);
}

static void put_integers(const craft *c, hid_t file, const char *name, hid_t type, int64_t count,
                         const int64_t *values) {
  if (left_out(c, name) || values == NULL) return;
  if (c->linked != NULL && strcmp(c->linked, name) == 0) {
    assert_true(H5Lcreate_external("/nowhere.h5", "/x", file, name, H5P_DEFAULT, H5P_DEFAULT) >= 0);
    return;
  }
  const hsize_t extent = (hsize_t)count;
  const hid_t space = H5Screate_simple(1, &extent, NULL);
  const hid_t id = H5Dcreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  assert_true(H5Dwrite(id, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0);
  H5Dclose(id);
  H5Sclose(space);
}

static hid_t creation_of(const craft *c) {
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk[2] = {(hsize_t)(c->chunk_rows > 0 ? c->chunk_rows : c->rows),
                            (hsize_t)(c->chunk_columns > 0 ? c->chunk_columns : c->columns)};
  const unsigned level = 3;
  if (c->contiguous) return creation;
  H5Pset_chunk(creation, c->flat_latent ? 1 : 2, chunk);
  if (c->shuffle) H5Pset_shuffle(creation);
  if (c->gzip) H5Pset_deflate(creation, 4);
  if (c->checksum) H5Pset_fletcher32(creation);
  if (c->nbit) H5Pset_nbit(creation);
  if (c->no_fill_of_edges) H5Pset_chunk_opts(creation, H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS);
  if (c->zstd_declared) H5Pset_filter(creation, 32015, H5Z_FLAG_OPTIONAL, 1, &level);
  return creation;
}

static void put_values(const craft *c, hid_t id) {
  const hsize_t first[2] = {0, 0};
  if (c->raw != NULL) {
    const herr_t result = H5Dwrite_chunk(id, H5P_DEFAULT, 0, first, (size_t)c->raw_bytes, c->raw);
    if (result < 0) (void)H5Eprint2(H5E_DEFAULT, stderr);
    assert_true(result >= 0);
  } else if (c->hole || c->claimed_rows > 0) {
    return;
  } else {
    assert_true(H5Dwrite(id, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, c->latent) >= 0);
  }
}

static void put_latent(const craft *c, hid_t file) {
  if (left_out(c, "latent")) return;
  const hsize_t rows = (hsize_t)(c->claimed_rows > 0 ? c->claimed_rows : c->rows);
  const hsize_t extent[2] = {c->flat_latent ? rows * (hsize_t)c->columns : rows, (hsize_t)c->columns};
  const hsize_t most[2] = {c->contiguous ? extent[0] : H5S_UNLIMITED, extent[1]};
  const hid_t space = H5Screate_simple(c->flat_latent ? 1 : 2, extent, most);
  const hid_t creation = creation_of(c);
  const hid_t type = c->double_latent       ? H5T_IEEE_F64LE
                     : c->big_endian_latent ? H5T_IEEE_F32BE
                                            : H5T_IEEE_F32LE;
  const hid_t id = H5Dcreate2(file, "latent", type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  assert_true(id >= 0);
  put_values(c, id);
  H5Dclose(id);
  H5Pclose(creation);
  H5Sclose(space);
}

static void put_extra(hid_t file) {
  const hsize_t extent = 2;
  const double values[2] = {1, 2};
  const hid_t group = H5Gcreate2(file, "notes", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  const hid_t space = H5Screate_simple(1, &extent, NULL);
  const hid_t id = H5Dcreate2(file, "score", H5T_IEEE_F64BE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  const hid_t attribute = H5Acreate2(file, "made_by", H5T_IEEE_F64LE, space, H5P_DEFAULT, H5P_DEFAULT);
  H5Dwrite(id, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values);
  H5Awrite(attribute, H5T_NATIVE_DOUBLE, values);
  H5Aclose(attribute);
  H5Dclose(id);
  H5Sclose(space);
  H5Gclose(group);
}

void craft_write(const craft *c, const char *path) {
  const hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  const bool small = c->small_integers;
  assert_true(file >= 0);
  put_text(c, file, "format", c->format);
  put_text(c, file, "modality", c->modality);
  put_text(c, file, "encoder", c->encoder);
  put_text(c, file, "dtype", c->dtype);
  put_number(c, file, "version", c->version);
  put_number(c, file, "width", c->width);
  if (c->extra) put_extra(file);
  put_integers(c, file, "id", small ? H5T_STD_I32BE : H5T_STD_U64LE, c->samples, c->id);
  put_integers(c, file, "offset", small ? H5T_STD_I32LE : H5T_STD_U64LE,
               c->offsets > 0 ? c->offsets : c->samples + 1, c->offset);
  put_integers(c, file, "label",
               small            ? H5T_STD_I8LE
               : c->wide_labels ? H5T_STD_U64LE
                                : H5T_STD_I32LE,
               c->samples, c->label);
  put_latent(c, file);
  assert_true(H5Fclose(file) >= 0);
}
