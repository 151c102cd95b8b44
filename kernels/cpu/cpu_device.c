/* core_device of the CPU: host memory; everything is done when the call returns, so streams and events are
 * the default ones (NULL) and waiting is free. */
#include <stdlib.h>   /* aligned_alloc, free */
#include <string.h>   /* memmove, memset */
#include <sys/mman.h> /* madvise */
#include <unistd.h>   /* sysconf */

#include "cpu_impl.h" /* kern_device_cpu_priv */

enum { LINE = 64, HUGE_PAGE = 2 << 20 };

static core_status cpu_allocate(size_t bytes, void **out) {
  *out = NULL;
  const size_t align = bytes >= 2 * (size_t)HUGE_PAGE ? HUGE_PAGE : LINE;
  CHECK(bytes <= PTRDIFF_MAX - align, CORE_ERR_MEMORY, "no memory: %zu bytes cannot be addressed", bytes);
  const size_t rounded = bytes == 0 ? align : (bytes + align - 1) / align * align;
  void *memory = aligned_alloc(align, rounded);
  CHECK(memory != NULL, CORE_ERR_MEMORY, "no memory for %zu bytes", bytes);
  /* Large pages spare the address cache in GEMMs and the optimizer; a system without them may say no. */
  if (align == HUGE_PAGE) (void)madvise(memory, rounded, MADV_HUGEPAGE);
  *out = memory;
  return CORE_OK;
}

static void cpu_release(void *pointer) {
  free(pointer);
}

static core_status cpu_memory(size_t *available, size_t *total) {
  const long page = sysconf(_SC_PAGESIZE), open = sysconf(_SC_AVPHYS_PAGES), all = sysconf(_SC_PHYS_PAGES);
  *available = page > 0 && open > 0 ? (size_t)page * (size_t)open : 0;
  *total = page > 0 && all > 0 ? (size_t)page * (size_t)all : 0;
  return CORE_OK;
}

static core_status cpu_copy(void *target, const void *source, size_t bytes, core_stream *stream) {
  (void)stream;
  if (bytes > 0) memmove(target, source, bytes);
  return CORE_OK;
}

static core_status cpu_fill(void *target, int byte, size_t bytes, core_stream *stream) {
  (void)stream;
  if (bytes > 0) memset(target, byte, bytes);
  return CORE_OK;
}

static core_status cpu_stream_create(core_stream **out) {
  *out = NULL;
  return CORE_OK;
}
static void cpu_stream_destroy(core_stream *stream) {
  (void)stream;
}
static core_status cpu_stream_wait(core_stream *stream) {
  (void)stream;
  return CORE_OK;
}
static core_status cpu_event_create(core_event **out) {
  *out = NULL;
  return CORE_OK;
}
static void cpu_event_destroy(core_event *event) {
  (void)event;
}
static core_status cpu_event_record(core_event *event, core_stream *stream) {
  (void)event, (void)stream;
  return CORE_OK;
}
static core_status cpu_event_query(core_event *event, bool *done) {
  (void)event;
  *done = true;
  return CORE_OK;
}
static core_status cpu_event_before(core_stream *stream, core_event *event) {
  (void)event, (void)stream;
  return CORE_OK;
}
static void cpu_watch(core_status (*poll)(void *), void *context) {
  (void)poll, (void)context; /* the host never waits for itself */
}

const core_device kern_device_cpu_priv = {
    .kind = CORE_DEVICE_CPU,
    .name = "cpu",
    .host_access = true,
    .allocate = cpu_allocate,
    .release = cpu_release,
    .host_allocate = cpu_allocate,
    .host_release = cpu_release,
    .memory = cpu_memory,
    .copy = cpu_copy,
    .copy_later = cpu_copy,
    .fill = cpu_fill,
    .stream_create = cpu_stream_create,
    .stream_destroy = cpu_stream_destroy,
    .stream_wait = cpu_stream_wait,
    .event_create = cpu_event_create,
    .event_destroy = cpu_event_destroy,
    .event_record = cpu_event_record,
    .event_query = cpu_event_query,
    .event_before = cpu_event_before,
    .watch = cpu_watch,
};
