/* The directory of checkpoints: names, publishing, cleaning, retention. Rank 0 alone works here. The order of
 * the operations is the whole point: at every instant the newest published checkpoint is whole, under its own
 * name or, while a save of the same step replaces it, under step-X.old. */
#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h> /* readlink */

#include "checkpoint/checkpoint_impl.h"
#include "core/file.h"
#include "core/log.h"

static const char *const suffix_of[] = {
    [CKPT_PUBLISHED] = "", [CKPT_REPLACED] = ".old", [CKPT_UNFINISHED] = ".tmp"};

core_status ckpt_path(char out[CKPT_PATH], const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(out, CKPT_PATH, format, arguments);
  va_end(arguments);
  CHECK(length >= 0 && length < CKPT_PATH, CORE_ERR_ARGUMENT,
        "path of %d bytes, at most %d are possible: %.80s...", length, CKPT_PATH - 1, out);
  return CORE_OK;
}

core_status ckpt_place_path(const char *directory, int64_t step, ckpt_place_kind kind, char out[CKPT_PATH]) {
  TRY(ckpt_path(out, "%s/step-%08lld%s", directory, (long long)step, suffix_of[kind]));
  return CORE_OK;
}

bool ckpt_place_parse(const char *name, ckpt_place *out) {
  if (strncmp(name, "step-", 5) != 0) return false;
  size_t digits = strspn(name + 5, "0123456789");
  if (digits < 8 || digits > 18 || (digits > 8 && name[5] == '0')) return false;
  *out = (ckpt_place){.step = strtoll(name + 5, NULL, 10)};
  for (int32_t kind = CKPT_PUBLISHED; kind <= CKPT_UNFINISHED; kind++) {
    out->kind = kind;
    if (strcmp(name + 5 + digits, suffix_of[kind]) == 0) return true;
  }
  return false;
}

static int compare_places(const void *left, const void *right) {
  const ckpt_place *a = left, *b = right;
  if (a->step != b->step) return a->step > b->step ? -1 : 1;
  return a->kind - b->kind;
}

static core_status add_place(const char *directory, const ckpt_place *place, ckpt_place **list,
                             int32_t *count) {
  char path[CKPT_PATH], file[CKPT_PATH];
  TRY(ckpt_place_path(directory, place->step, (ckpt_place_kind)place->kind, path));
  TRY(ckpt_path(file, "%s/" CKPT_MANIFEST, path));
  ckpt_place *grown = realloc(*list, ((size_t)*count + 1) * sizeof **list);
  CHECK(grown != NULL, CORE_ERR_MEMORY, "no memory for a list of %d checkpoints", *count + 1);
  *list = grown;
  grown[*count] = *place;
  grown[*count].manifest = core_file_exists(file);
  ++*count;
  return CORE_OK;
}

core_status ckpt_places(const char *directory, ckpt_place **out, int32_t *count) {
  core_status status = CORE_OK;
  ckpt_place place;
  *out = NULL;
  *count = 0;
  DIR *stream = opendir(directory);
  if (stream == NULL && errno == ENOENT) return CORE_OK;
  CHECK(stream != NULL, CORE_ERR_IO, "cannot list %s: %s", directory, strerror(errno));
  for (const struct dirent *entry = readdir(stream); entry != NULL; entry = readdir(stream)) {
    if (ckpt_place_parse(entry->d_name, &place)) TRY_OUT(add_place(directory, &place, out, count), end);
  }
  if (*count > 0) qsort(*out, (size_t)*count, sizeof **out, compare_places);
end:
  closedir(stream);
  if (status != CORE_OK) {
    free(*out);
    *out = NULL;
    *count = 0;
  }
  return status;
}

/* ---- removing ---- */

static core_status remove_manifest(const char *path) {
  char file[CKPT_PATH];
  TRY(ckpt_path(file, "%s/" CKPT_MANIFEST, path));
  if (!core_file_exists(file)) return CORE_OK;
  TRY(core_file_remove(file));
  TRY(core_file_sync_directory(path));
  return CORE_OK;
}

static bool is_ours(const char *name) {
  return strncmp(name, "rank-", 5) == 0 || strncmp(name, CKPT_MANIFEST, sizeof CKPT_MANIFEST - 1) == 0;
}

static core_status remove_files(const char *path, DIR *stream) {
  core_status first = CORE_OK;
  core_error saved = {0};
  char file[CKPT_PATH];
  for (const struct dirent *entry = readdir(stream); entry != NULL; entry = readdir(stream)) {
    if (!is_ours(entry->d_name)) continue;
    core_status status = ckpt_path(file, "%s/%s", path, entry->d_name);
    if (status == CORE_OK) status = core_file_remove(file);
    if (status != CORE_OK && first == CORE_OK) core_error_save(&saved);
    first = core_keep_first(first, &saved, status);
  }
  return first;
}

core_status ckpt_remove(const char *path) {
  core_error saved = {0};
  /* Marker first: a crash from here on leaves a directory that nobody takes for a checkpoint. */
  TRY(remove_manifest(path));
  DIR *stream = opendir(path);
  CHECK(stream != NULL, CORE_ERR_IO, "cannot list %s: %s", path, strerror(errno));
  core_status status = remove_files(path, stream);
  closedir(stream);
  if (status != CORE_OK) core_error_save(&saved);
  status = core_keep_first(status, &saved, core_file_remove_directory(path));
  TRY(status);
  return CORE_OK;
}

static void warn(const char *what, const char *path) {
  char text[2 * CORE_ERROR_TEXT];
  core_error_format(core_error_get(), false, text, sizeof text);
  core_error_clear();
  LOG_WARNING("%s %s: %s", what, path, text);
}

static core_status exists(const char *directory, int64_t step, ckpt_place_kind kind, bool *out) {
  char path[CKPT_PATH], file[CKPT_PATH];
  TRY(ckpt_place_path(directory, step, kind, path));
  TRY(ckpt_path(file, "%s/" CKPT_MANIFEST, path));
  *out = core_file_exists(file);
  return CORE_OK;
}

/* ---- cleaning what a crash left ---- */

/* newer: a published checkpoint with manifest is newer than this place. */
static core_status clean_place(const char *directory, const ckpt_place *place, bool newer) {
  char path[CKPT_PATH], final[CKPT_PATH];
  bool successor = false;
  TRY(ckpt_place_path(directory, place->step, (ckpt_place_kind)place->kind, path));
  TRY(ckpt_place_path(directory, place->step, CKPT_PUBLISHED, final));
  TRY(exists(directory, place->step, CKPT_PUBLISHED, &successor));
  if (place->kind == CKPT_PUBLISHED && place->manifest) return CORE_OK;
  if (place->kind == CKPT_PUBLISHED &&
      !newer) { /* removal never begins with the newest: it has lost its manifest */
    LOG_WARNING("%s has no " CKPT_MANIFEST "; it is left as it is, but cannot be resumed from", path);
    return CORE_OK;
  }
  if (place->kind == CKPT_REPLACED && place->manifest && !successor) {
    /* An unfinished step-X without manifest may be in the way of the name. */
    if (core_file_exists(final)) TRY(ckpt_remove(final));
    TRY(core_file_rename(path, final));
    TRY(core_file_sync_directory(directory));
    LOG_WARNING("put back checkpoint %s, whose replacement was never finished", final);
    return CORE_OK;
  }
  TRY(ckpt_remove(path));
  LOG_INFO("removed unfinished checkpoint %s", path);
  return CORE_OK;
}

core_status ckpt_clean(const char *directory, int64_t pending) {
  ckpt_place *place;
  int32_t count;
  TRY(ckpt_places(directory, &place, &count));
  /* Replaced ones come after the published one of their step, so its absence is settled when they are seen.
   */
  bool newer = false; /* the list begins with the newest */
  for (int32_t i = 0; i < count; i++) {
    bool written = place[i].kind == CKPT_UNFINISHED && place[i].step == pending;
    if (!written && clean_place(directory, &place[i], newer) != CORE_OK)
      warn("cannot clean up in", directory);
    if (place[i].kind == CKPT_PUBLISHED && place[i].manifest) newer = true;
  }
  free(place);
  return CORE_OK;
}

/* ---- publishing ---- */

core_status ckpt_prepare(const char *directory, int64_t step) {
  char path[CKPT_PATH];
  TRY(ckpt_place_path(directory, step, CKPT_UNFINISHED, path));
  if (core_file_exists(path)) TRY(ckpt_remove(path));
  TRY(core_file_make_directory(path));
  return CORE_OK;
}

/* Writes the manifest and reads it back as a reader would. */
static core_status write_manifest(const char *path, const ckpt_manifest *manifest) {
  char file[CKPT_PATH], *text;
  size_t count;
  int64_t read;
  ckpt_manifest again;
  TRY(ckpt_path(file, "%s/" CKPT_MANIFEST, path));
  TRY(ckpt_manifest_print(manifest, &text, &count));
  core_status status = core_file_replace(file, text, count);
  free(text);
  TRY(status);
  TRY(ckpt_manifest_text(path, &text, &read));
  status = ckpt_manifest_take(path, text, read, &again);
  free(text);
  TRY(status);
  ckpt_manifest_free(&again);
  return CORE_OK;
}

core_status ckpt_publish(const char *directory, const ckpt_manifest *manifest) {
  char unfinished[CKPT_PATH], final[CKPT_PATH], replaced[CKPT_PATH];
  bool there = false;
  TRY(ckpt_place_path(directory, manifest->step, CKPT_UNFINISHED, unfinished));
  TRY(ckpt_place_path(directory, manifest->step, CKPT_PUBLISHED, final));
  TRY(ckpt_place_path(directory, manifest->step, CKPT_REPLACED, replaced));
  TRY(write_manifest(unfinished, manifest));
  TRY(core_file_sync_directory(unfinished));
  TRY(exists(directory, manifest->step, CKPT_PUBLISHED, &there));
  if (there) {
    if (core_file_exists(replaced)) TRY(ckpt_remove(replaced));
    TRY(core_file_rename(final, replaced));
  } else if (core_file_exists(final)) {
    TRY(ckpt_remove(final));
  }
  core_status status = core_file_rename(unfinished, final);
  if (status != CORE_OK && there) {
    core_error saved;
    core_error_save(&saved);
    status = core_keep_first(status, &saved, core_file_rename(replaced, final));
  }
  TRY(status);
  TRY(core_file_sync_directory(directory));
  if (there && ckpt_remove(replaced) != CORE_OK) warn("cannot remove the replaced checkpoint", replaced);
  return CORE_OK;
}

/* ---- the best ---- */

/* The step that the link names; -1: there is none, or it names nothing of ours. */
static int64_t best_step(const char *directory) {
  char path[CKPT_PATH], target[CKPT_PATH];
  ckpt_place place;
  if (ckpt_path(path, "%s/" CKPT_BEST, directory) != CORE_OK) {
    core_error_clear();
    return -1;
  }
  ssize_t length = readlink(path, target, sizeof target - 1);
  if (length < 0) return -1;
  target[length] = '\0';
  return ckpt_place_parse(target, &place) && place.kind == CKPT_PUBLISHED ? place.step : -1;
}

core_status ckpt_mark_best(const char *directory, int64_t step) {
  char path[CKPT_PATH], published[CKPT_PATH];
  bool there = false;
  TRY(exists(directory, step, CKPT_PUBLISHED, &there));
  if (!there || best_step(directory) == step) return CORE_OK;
  TRY(ckpt_place_path("", step, CKPT_PUBLISHED, published));
  TRY(ckpt_path(path, "%s/" CKPT_BEST, directory));
  TRY(core_file_link(published + 1, path)); /* relative: the directory may be moved */
  return CORE_OK;
}

/* ---- retention ---- */

static void remove_place(const char *directory, const ckpt_place *place) {
  char path[CKPT_PATH] = "";
  core_status status = ckpt_place_path(directory, place->step, (ckpt_place_kind)place->kind, path);
  if (status == CORE_OK) status = ckpt_remove(path);
  if (status != CORE_OK) warn("cannot remove the old checkpoint", path);
}

/* Whether place i is the first of its stretch of `every` steps; the first stretch, which begins with step 0,
 * has none. Newer places come before older ones. */
static bool first_of_stretch(const ckpt_place *place, int32_t count, int32_t i, int64_t every) {
  if (every <= 0 || place[i].step < every) return false;
  for (int32_t j = i + 1; j < count; j++)
    if (place[j].kind == CKPT_PUBLISHED && place[j].manifest &&
        place[j].step / every == place[i].step / every)
      return false;
  return true;
}

core_status ckpt_retain(const ckpt_options *options, int64_t newest, int64_t pending) {
  ckpt_place *place;
  int32_t count, kept = 0;
  int64_t best = best_step(options->directory);
  TRY(ckpt_clean(options->directory, pending)); /* what an earlier failure left */
  TRY(ckpt_places(options->directory, &place, &count));
  for (int32_t i = 0; i < count; i++) {
    const ckpt_place *p = &place[i];
    /* Later steps are of a run that went back to before them: damaged, or about to be saved again. They must
     * not count, or they would push out what was just published. */
    if (p->kind != CKPT_PUBLISHED || !p->manifest || p->step > newest) continue;
    if (kept++ < options->keep || p->step == best || (p->step > 0 && p->step == options->spare)) continue;
    if (first_of_stretch(place, count, i, options->keep_every)) continue;
    remove_place(options->directory, p);
  }
  free(place);
  return CORE_OK;
}
