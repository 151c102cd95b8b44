/* Safetensors files made by hand, sound or not, in a folder of their own. */
#ifndef SAFETENSORS_CRAFT_H
#define SAFETENSORS_CRAFT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A new empty folder under the temporary directory; the name is static. */
static inline const char *craft_folder(void) {
  static char folder[64];
  snprintf(folder, sizeof folder, "/tmp/antiphon-safetensors-XXXXXX");
  if (!mkdtemp(folder)) exit(1);
  return folder;
}

static inline void craft_bytes(const char *path, const void *bytes, size_t count) {
  FILE *file = fopen(path, "wb");
  if (!file || fwrite(bytes, 1, count, file) != count || fclose(file) != 0) exit(1);
}

/* Length, header, and `data` bytes 0, 1, 2, ... that are no NaN in any of the types (all below 0x7c). */
static inline size_t craft_make(const char *header, size_t data, uint8_t *out) {
  size_t length = strlen(header);
  for (int i = 0; i < 8; i++) out[i] = (uint8_t)(length >> (8 * i));
  memcpy(out + 8, header, length);
  for (size_t i = 0; i < data; i++) out[8 + length + i] = (uint8_t)(i % 0x7c);
  return 8 + length + data;
}

static inline void craft_file(const char *path, const char *header, size_t data) {
  uint8_t *bytes = malloc(8 + strlen(header) + data + 1);
  if (!bytes) exit(1);
  craft_bytes(path, bytes, craft_make(header, data, bytes));
  free(bytes);
}

static inline void craft_remove(const char *folder) {
  char command[128];
  snprintf(command, sizeof command, "rm -rf '%s'", folder);
  if (system(command) != 0) exit(1);
}

#endif
