/* Tensors of a device as a test sees them: copies on the host. */
#ifndef TESTS_TEST_DEVICE_H
#define TESTS_TEST_DEVICE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/device.h"
#include "core/tensor.h"
#include "kernels/kernels.h"

enum { TEST_SKIPPED = 77 };

/* Exit status of a test that runs with the setting "run.device=NAME", or NULL: 0 where that device can be
 * opened, else TEST_SKIPPED with the reason said; 1 where the emulation cannot be, which is never missing. */
static inline int test_device_missing(const char *setting, int32_t local_rank) {
  static const char key[] = "run.device=";
  const kern_ops *ops = NULL;
  if (!setting || strncmp(setting, key, sizeof key - 1) != 0) return 0;
  if (kern_select(setting + sizeof key - 1, local_rank, &ops) == CORE_OK) return 0;
  printf("skipped: %s\n", core_error_get()->message);
#ifdef ANTIPHON_CUDA_EMULATED
  return 1;
#else
  return TEST_SKIPPED;
#endif
}

static inline void test_device_must(core_status status) {
  if (status == CORE_OK) return;
  fprintf(stderr, "%s\n", core_error_get()->message);
  exit(1);
}

/* A copy on the host, to be freed. */
static inline void *test_fetch(const core_device *device, core_tensor tensor) {
  size_t bytes = core_tensor_bytes(&tensor);
  void *copy = malloc(bytes + 1);
  if (!copy) exit(1);
  if (bytes > 0) test_device_must(device->copy(copy, tensor.data, bytes, NULL));
  return copy;
}

static inline void test_store(const core_device *device, core_tensor tensor, const void *from) {
  size_t bytes = core_tensor_bytes(&tensor);
  if (bytes > 0) test_device_must(device->copy(tensor.data, from, bytes, NULL));
}

#endif
