/* Opening the CUDA backend where something is missing, and contexts whose memory runs out at every allocation
 * in turn. Emulated builds only: each case is a process of its own, with a device of its own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "tests/cuda_double/cuda_double.h"

enum { GOOD, BAD };

/* Runs `judge` in a child that sees the settings, NULL-terminated pairs; its verdict must be GOOD. */
static void in_child(int (*judge)(void), const char *const *settings) {
  const pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    for (; settings[0] != NULL; settings += 2) setenv(settings[0], settings[1], 1);
    _exit(judge());
  }
  int status = 0;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  assert_int_equal(WEXITSTATUS(status), GOOD);
}

static int verdict(core_status got, core_status want, const char *first, const char *second) {
  const char *message = got == CORE_OK ? "no failure" : core_error_get()->message;
  if (got == want && strstr(message, first) != NULL && strstr(message, second) != NULL) return GOOD;
  fprintf(stderr, "\"%s\" is no %s with \"%s\" and \"%s\"\n", message, core_status_name(want), first, second);
  return BAD;
}

static int no_driver(void) {
  const kern_ops *ops;
  return verdict(kern_cuda(0, &ops), CORE_ERR_UNSUPPORTED, "no NVIDIA driver", "CUDA 13.0");
}
static int old_driver(void) {
  const kern_ops *ops;
  return verdict(kern_cuda(0, &ops), CORE_ERR_UNSUPPORTED, "driver is for CUDA 12.8", "13.0");
}
static int no_device(void) {
  const kern_ops *ops;
  return verdict(kern_cuda(0, &ops), CORE_ERR_UNSUPPORTED, "no CUDA device",
                 "CUDA_VISIBLE_DEVICES is none-such");
}
static int old_device(void) {
  const kern_ops *ops;
  return verdict(kern_cuda(0, &ops), CORE_ERR_UNSUPPORTED, "compute capability 7.5", "8.0 or newer");
}

/* The ordinal counts around the devices; a process keeps the one that it opened. */
static int second_device(void) {
  const kern_ops *ops, *same;
  if (kern_cuda(3, &ops) != CORE_OK || strncmp(ops->device->name, "cuda:1 ", 7) != 0) return BAD;
  if (kern_cuda(1, &same) != CORE_OK || same != ops) return BAD;
  return verdict(kern_cuda(0, &same), CORE_ERR_ARGUMENT, "device 0 was asked for", "cuda:1 ");
}

static void what_is_missing_is_named(void **state) {
  (void)state;
  in_child(no_driver, (const char *[]){"CUDA_DOUBLE_DRIVER", "0", NULL});
  in_child(old_driver, (const char *[]){"CUDA_DOUBLE_DRIVER", "12080", NULL});
  in_child(no_device,
           (const char *[]){"CUDA_DOUBLE_DEVICES", "0", "CUDA_VISIBLE_DEVICES", "none-such", NULL});
  in_child(old_device, (const char *[]){"CUDA_DOUBLE_CAPABILITY", "75", NULL});
}

static void ordinals_count_around_the_devices(void **state) {
  (void)state;
  in_child(second_device, (const char *[]){"CUDA_DOUBLE_DEVICES", "2", NULL});
}

/* Fails the n-th allocation for n = 1, 2, ... until a context is made: an error each time, and nothing kept.
 */
static int short_memory(void) {
  const kern_limits limits = {
      .rows = 64, .width = 64, .experts = 8, .sequence = 64, .segments = 8, .heads = 2, .updates = 4};
  const kern_ops *ops;
  if (kern_cuda(0, &ops) != CORE_OK) return BAD;
  const int64_t before = cuda_double_allocations();
  for (int64_t n = 1; n < 32; n++) {
    kern_context *context = NULL;
    cuda_double_fail_allocation(n);
    const core_status status = ops->context_create(&limits, &context);
    cuda_double_fail_allocation(0);
    if (status == CORE_OK) {
      ops->context_destroy(context);
      return n > 1 && cuda_double_allocations() == before ? GOOD : BAD;
    }
    if (verdict(status, CORE_ERR_MEMORY, "", "") != GOOD || context != NULL) return BAD;
    if (cuda_double_allocations() != before) return BAD;
  }
  return BAD;
}

/* What context_bytes promises is what a context takes of the device. */
static int promised_bytes(void) {
  const kern_limits limits = {.rows = 5000,
                              .width = 640,
                              .experts = 32,
                              .sequence = 512,
                              .segments = 600,
                              .heads = 8,
                              .updates = 100};
  const kern_ops *ops;
  kern_context *context;
  size_t before, after, total;
  if (kern_cuda(0, &ops) != CORE_OK || ops->device->memory(&before, &total) != CORE_OK) return BAD;
  if (ops->context_create(&limits, &context) != CORE_OK) return BAD;
  if (ops->device->memory(&after, &total) != CORE_OK) return BAD;
  const size_t promised = ops->context_bytes(&limits), taken = before - after;
  ops->context_destroy(context);
  if (taken >= promised && taken - promised <= (size_t)4 << 20) return GOOD;
  fprintf(stderr, "%zu bytes promised, %zu taken\n", promised, taken);
  return BAD;
}

static void contexts_fail_cleanly_and_keep_their_promise(void **state) {
  (void)state;
  in_child(short_memory, (const char *[]){NULL});
  in_child(promised_bytes, (const char *[]){NULL});
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(what_is_missing_is_named),
      cmocka_unit_test(ordinals_count_around_the_devices),
      cmocka_unit_test(contexts_fail_cleanly_and_keep_their_promise),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
