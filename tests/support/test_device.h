/* Tensors of a device as a test sees them: copies on the host. */
#ifndef TESTS_TEST_DEVICE_H
#define TESTS_TEST_DEVICE_H

#include <stdio.h>
#include <stdlib.h>

#include "core/device.h"
#include "core/tensor.h"

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
