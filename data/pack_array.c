/* Outline: the header of a .npy file, a Python dictionary of three known keys, read by a grammar of its own
 * (nothing is evaluated); the header of a .safetensors file, JSON; values. */
#include <ctype.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "data/memory_impl.h"
#include "data/pack_impl.h"

enum { MOST_NPY_HEADER = 1 << 16, MOST_SAFETENSORS_HEADER = 100 << 20, NPY_MAGIC = 6 };

/* ---- shapes ---- */

int64_t data_array_count_priv(const data_array *array) {
  return array->shape[0] * array->shape[1] * array->shape[2] * array->shape[3];
}

/* Bytes of all values; -1 when they cannot be addressed. */
static int64_t array_bytes(const data_array *array) {
  int64_t bytes = array->value_bytes;
  for (int i = 0; i < 4; ++i)
    if (array->shape[i] < 0 || __builtin_mul_overflow(bytes, array->shape[i], &bytes)) return -1;
  return bytes;
}

/* ---- .npy ---- */

typedef struct cursor {
  const char *at, *end;
} cursor;

static bool skip(cursor *c, char wanted) {
  while (c->at < c->end && isspace((unsigned char)*c->at)) ++c->at;
  if (c->at == c->end || *c->at != wanted) return false;
  ++c->at;
  return true;
}

/* A quoted word without escapes. */
static bool take_word(cursor *c, char *word, size_t capacity) {
  size_t used = 0;
  const bool single = skip(c, '\'');
  if (!single && !skip(c, '"')) return false;
  for (; c->at < c->end && *c->at != (single ? '\'' : '"'); ++c->at) {
    if (used + 1 == capacity || *c->at == '\\') return false;
    word[used++] = *c->at;
  }
  word[used] = '\0';
  return skip(c, single ? '\'' : '"');
}

static bool take_number(cursor *c, int64_t *number) {
  int digits = 0;
  *number = 0;
  while (c->at < c->end && isspace((unsigned char)*c->at)) ++c->at;
  for (; c->at < c->end && isdigit((unsigned char)*c->at); ++c->at, ++digits)
    if (__builtin_mul_overflow(*number, 10, number) || __builtin_add_overflow(*number, *c->at - '0', number))
      return false;
  return digits > 0;
}

/* "(3, 4)", "(3,)", "()" */
static bool take_shape(cursor *c, data_array *out) {
  if (!skip(c, '(')) return false;
  for (int i = 0; i < 4; ++i) out->shape[i] = 1;
  for (out->rank = 0; !skip(c, ')'); ++out->rank) {
    if (out->rank == 4 || !take_number(c, &out->shape[out->rank])) return false;
    if (skip(c, ',')) continue;
    ++out->rank;
    return skip(c, ')');
  }
  return true;
}

/* "<f4": order, kind, bytes. */
static bool parse_descr(const char *text, data_array *out) {
  static const struct {
    const char *text;
    data_number kind;
    int64_t bytes;
  } known[] = {
      {"<f2", DATA_NUMBER_FLOAT16, 2},  {"<f4", DATA_NUMBER_FLOAT32, 4},  {"<f8", DATA_NUMBER_FLOAT64, 8},
      {"<i2", DATA_NUMBER_SIGNED, 2},   {"<i4", DATA_NUMBER_SIGNED, 4},   {"<i8", DATA_NUMBER_SIGNED, 8},
      {"<u2", DATA_NUMBER_UNSIGNED, 2}, {"<u4", DATA_NUMBER_UNSIGNED, 4}, {"<u8", DATA_NUMBER_UNSIGNED, 8},
      {"|i1", DATA_NUMBER_SIGNED, 1},   {"|u1", DATA_NUMBER_UNSIGNED, 1}};
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
    if (strcmp(known[i].text, text) == 0) {
      out->kind = known[i].kind;
      out->value_bytes = known[i].bytes;
      return true;
    }
  return false;
}

static bool take_truth(cursor *c, bool *truth) {
  while (c->at < c->end && isspace((unsigned char)*c->at)) ++c->at;
  *truth = c->end - c->at >= 4 && strncmp(c->at, "True", 4) == 0;
  if (!*truth && (c->end - c->at < 5 || strncmp(c->at, "False", 5) != 0)) return false;
  c->at += *truth ? 4 : 5;
  return true;
}

core_status data_npy_parse_priv(const char *header, int64_t length, data_array *out) {
  cursor c = {header, header + length};
  char key[32], descr[64] = "";
  bool fortran = false, good = skip(&c, '{');
  int found = 0;
  for (; good && !skip(&c, '}'); (void)skip(&c, ',')) {
    good = take_word(&c, key, sizeof key) && skip(&c, ':');
    if (good && strcmp(key, "descr") == 0)
      good = take_word(&c, descr, sizeof descr), found |= 1;
    else if (good && strcmp(key, "fortran_order") == 0)
      good = take_truth(&c, &fortran), found |= 2;
    else if (good && strcmp(key, "shape") == 0)
      good = take_shape(&c, out), found |= 4;
    else
      good = false;
  }
  CHECK(good && found == 7, CORE_ERR_FORMAT, "its header is not that of an array of plain numbers");
  CHECK(!fortran, CORE_ERR_UNSUPPORTED, "it is stored column by column (fortran_order); save it in C order");
  CHECK(parse_descr(descr, out), CORE_ERR_UNSUPPORTED,
        "it holds values of type \"%s\", which is not read here", descr);
  return CORE_OK;
}

static core_status open_npy(data_array *out) {
  uint8_t head[12] = {0};
  const int64_t file = out->identity.bytes;
  CHECK(file >= (int64_t)sizeof head, CORE_ERR_FORMAT, "not a .npy file (%lld bytes)", (long long)file);
  TRY(core_file_read_at(out->fd, out->path, head, sizeof head, 0));
  CHECK(memcmp(head, "\x93NUMPY", NPY_MAGIC) == 0 && head[6] >= 1 && head[6] <= 3, CORE_ERR_FORMAT,
        "not a .npy file of version 1, 2 or 3");
  const int64_t start = head[6] == 1 ? 10 : 12;
  int64_t length = head[8] | (int64_t)head[9] << 8;
  if (head[6] > 1) length |= (int64_t)head[10] << 16 | (int64_t)head[11] << 24;
  CHECK(length <= MOST_NPY_HEADER && length <= file - start, CORE_ERR_CORRUPT,
        "its header claims %lld bytes in a file of %lld", (long long)length, (long long)file);
  char *header = NULL;
  TRY(DATA_ALLOCATE(length + 1, "header of an array", &header));
  core_status status = core_file_read_at(out->fd, out->path, header, (size_t)length, start);
  if (status == CORE_OK) status = data_npy_parse_priv(header, length, out);
  free(header);
  TRY(status);
  out->at = start + length;
  const int64_t bytes = array_bytes(out);
  CHECK(bytes >= 0 && bytes <= file - out->at, CORE_ERR_CORRUPT,
        "it is cut short: its header speaks of more values than it holds");
  return CORE_OK;
}

/* ---- .safetensors ---- */

static core_status open_safetensors(const char *name, data_array *out) {
  uint8_t head[8] = {0};
  uint64_t length = 0;
  const int64_t file = out->identity.bytes;
  CHECK(file >= (int64_t)sizeof head, CORE_ERR_FORMAT, "not a .safetensors file (%lld bytes)",
        (long long)file);
  TRY(core_file_read_at(out->fd, out->path, head, sizeof head, 0));
  for (int i = 0; i < 8; ++i) length |= (uint64_t)head[i] << 8 * i;
  CHECK(length <= MOST_SAFETENSORS_HEADER && (int64_t)length <= file - 8, CORE_ERR_CORRUPT,
        "its header claims %llu bytes in a file of %lld", (unsigned long long)length, (long long)file);
  char *header = NULL;
  TRY(DATA_ALLOCATE((int64_t)length + 1, "header of tensors", &header));
  core_status status = core_file_read_at(out->fd, out->path, header, (size_t)length, 8);
  if (status == CORE_OK)
    status = data_safetensors_parse_priv(header, (int64_t)length, file - 8 - (int64_t)length, name, out);
  free(header);
  TRY(status);
  out->at += 8 + (int64_t)length;
  return CORE_OK;
}

/* ---- either ---- */

static bool ends_with(const char *text, const char *end) {
  const size_t length = strlen(text), tail = strlen(end);
  return length >= tail && strcmp(text + length - tail, end) == 0;
}

static core_status open_any(const char *path, const char *name, data_array *out) {
  TRY(data_text_priv(&out->path, "%s", path));
  TRY(data_identity_of_priv(path, &out->identity));
  TRY(core_file_open(path, O_RDONLY, &out->fd));
  core_status status = CORE_OK;
  if (ends_with(path, ".npy"))
    status = open_npy(out);
  else if (ends_with(path, ".safetensors"))
    status = open_safetensors(name, out);
  else
    FAIL(CORE_ERR_FORMAT, "%s: expected a .npy or .safetensors file", path);
  if (status != CORE_OK) return core_error_context(status, "%s", path);
  return CORE_OK;
}

core_status data_array_open_priv(const char *path, const char *name, data_array *out) {
  *out = (data_array){.fd = -1, .shape = {1, 1, 1, 1}};
  const core_status status = open_any(path, name, out);
  if (status != CORE_OK) data_array_close_priv(out);
  TRY(status);
  return CORE_OK;
}

void data_array_close_priv(data_array *array) {
  if (array->path != NULL && array->fd >= 0) (void)close(array->fd);
  free(array->path);
  *array = (data_array){.fd = -1};
}

core_status data_array_read_priv(const data_array *array, int64_t first, int64_t count, void *out) {
  TRY(core_file_read_at(array->fd, array->path, out, (size_t)(count * array->value_bytes),
                        array->at + first * array->value_bytes));
  return CORE_OK;
}

static int64_t widen(const data_array *array, const uint8_t *value) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < array->value_bytes; ++i) bits |= (uint64_t)value[i] << 8 * i;
  const int64_t unused = 64 - 8 * array->value_bytes;
  if (array->kind == DATA_NUMBER_SIGNED) return (int64_t)(bits << unused) >> unused;
  return bits > INT64_MAX ? -1 : (int64_t)bits;
}

core_status data_array_integers_priv(const data_array *array, int64_t least, int64_t most, int64_t **out) {
  const int64_t count = data_array_count_priv(array);
  uint8_t *raw = NULL;
  *out = NULL;
  CHECK(array->rank == 1 && (array->kind == DATA_NUMBER_SIGNED || array->kind == DATA_NUMBER_UNSIGNED),
        CORE_ERR_FORMAT, "%s: must be a list of integers", array->path);
  TRY(DATA_ALLOCATE(count * array->value_bytes, "integers", &raw));
  core_status status = DATA_ALLOCATE(count, "integers", out);
  if (status == CORE_OK) status = data_array_read_priv(array, 0, count, raw);
  int64_t outside = -1;
  for (int64_t i = 0; status == CORE_OK && i < count; ++i) {
    (*out)[i] = widen(array, raw + i * array->value_bytes);
    if (outside < 0 && ((*out)[i] < least || (*out)[i] > most)) outside = i;
  }
  free(raw);
  if (status == CORE_OK && outside >= 0)
    status = core_error_begin(CORE_ERR_FORMAT, __func__, __FILE__, __LINE__,
                              "%s: entry %lld does not lie between %lld and %lld", array->path,
                              (long long)outside, (long long)least, (long long)most);
  if (status != CORE_OK) {
    free(*out);
    *out = NULL;
  }
  TRY(status);
  return CORE_OK;
}
