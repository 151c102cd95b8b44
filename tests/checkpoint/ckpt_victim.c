#include "ckpt_victim.h"

#include <stdio.h>
#include <stdlib.h>

victim victim_make(const fixture *f, const char *name, const spec *specs, int32_t count, int64_t step,
                   uint64_t generation) {
  victim v = {.f = f, .specs = specs, .count = count};
  char directory[CKPT_PATH - 64];
  layout l = layout_make(specs, count, 1, 0, 0, 1);
  ckpt_writer *writer;
  snprintf(directory, sizeof directory, "%s/%s", f->directory, name);
  const ckpt_options options = {.directory = directory};
  EXPECT_OK(ckpt_writer_create(f->control, &options, l.tensor, l.count, &writer));
  EXPECT_OK(save_step(f, writer, &l, specs, count, step, generation));
  ckpt_writer_destroy(writer);
  layout_free(&l);
  snprintf(v.path, sizeof v.path, "%s/step-%08lld", directory, (long long)step);
  snprintf(v.manifest_path, sizeof v.manifest_path, "%s/manifest.json", v.path);
  snprintf(v.rank_path, sizeof v.rank_path, "%s/rank-00000.ckpt", v.path);
  v.manifest = slurp(v.manifest_path, &v.manifest_count);
  v.rank = slurp(v.rank_path, &v.rank_count);
  EXPECT_OK(ckpt_verify(v.path, NULL));
  return v;
}

void victim_restore(const victim *v) {
  spit(v->manifest_path, v->manifest, v->manifest_count);
  spit(v->rank_path, v->rank, v->rank_count);
}

void victim_free(victim *v) {
  free(v->manifest);
  free(v->rank);
}

core_status victim_load(const victim *v) {
  ckpt_reader *reader;
  layout full = layout_full(v->specs, v->count);
  core_status status = ckpt_reader_open(v->f->control, v->path, &reader);
  if (status == CORE_OK) {
    status = ckpt_reader_load(reader, full.tensor, full.count);
    if (status == CORE_OK) assert_null(layout_difference(&full, v->specs, v->count, SEED));
    ckpt_reader_close(reader);
  }
  layout_free(&full);
  return status;
}

void victim_expect_found(const victim *v, const char *what, int64_t where) {
  core_status status = ckpt_verify(v->path, NULL);
  if (status == CORE_OK) fail_msg("%s at %lld is not found", what, (long long)where);
  if (!ckpt_is_damage(status))
    fail_msg("%s at %lld: %s does not lead to an older checkpoint", what, (long long)where,
             core_status_text(status));
  if (core_error_get()->message[0] == 0) fail_msg("%s at %lld has no message", what, (long long)where);
  (void)victim_load(v);
}
