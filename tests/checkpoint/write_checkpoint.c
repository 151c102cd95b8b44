/* write_checkpoint DIRECTORY: saves tensors of every dtype as step 5 and, beside it, the raw bytes of each as
 * DIRECTORY/<number>.raw with their names in DIRECTORY/names: what an independent reader is compared with. */
#include <stdio.h>

#include "ckpt_fixture.h"

static core_status write(comm_group *control, const char *directory, const layout *l) {
  const ckpt_options options = {.directory = directory};
  ckpt_writer *writer;
  TRY(ckpt_writer_create(control, &options, l->tensor, l->count, &writer));
  core_status status = ckpt_writer_begin(writer, 5, "{\"seed\": 18446744073709551615}");
  if (status == CORE_OK) status = ckpt_writer_commit(writer);
  ckpt_writer_destroy(writer);
  TRY(status);
  return CORE_OK;
}

static void write_raw(const char *directory, const layout *l) {
  char path[CKPT_PATH];
  snprintf(path, sizeof path, "%s/names", directory);
  FILE *names = fopen(path, "w");
  for (int32_t i = 0; names != NULL && i < l->count; i++) {
    const ckpt_tensor *t = &l->tensor[i];
    fprintf(names, "%s\n", t->name);
    snprintf(path, sizeof path, "%s/%d.raw", directory, i);
    spit(path, t->data, (size_t)t->count * core_dtype_size(t->dtype));
  }
  if (names != NULL) fclose(names);
}

int main(int count, char **argument) {
  comm_world *world;
  if (count != 2 || comm_start(&(comm_options){0}, &world) != CORE_OK) return 2;
  layout l = layout_make(all_specs, all_specs_count, 0, 0, 0, 1);
  layout_fill(&l, all_specs, all_specs_count, 7);
  core_status status = write(comm_control_group(world), argument[1], &l);
  if (status == CORE_OK) write_raw(argument[1], &l);
  if (status != CORE_OK) fprintf(stderr, "%s\n", core_error_get()->message);
  layout_free(&l);
  comm_finish(world);
  return status == CORE_OK ? 0 : 1;
}
