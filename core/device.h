/* Device interface: memory, copies, streams and events of one processor kind. kernels/ implements it
 * (kern_device_cpu, later CUDA); comm and checkpoint receive a pointer and need not know which it is. */
#ifndef CORE_DEVICE_H
#define CORE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>

#include "core/status.h"

typedef enum core_device_kind { CORE_DEVICE_CPU, CORE_DEVICE_CUDA } core_device_kind;

/* Opaque handles of the implementation; NULL is the default stream. */
typedef struct core_stream core_stream;
typedef struct core_event core_event;

typedef struct core_device {
  core_device_kind kind;
  const char *name; /* for messages: "cpu", "cuda:0 NVIDIA H100" */
  bool host_access; /* the CPU may read and write this memory directly */

  /* 64-byte aligned, uninitialised. Errors: ERR_MEMORY. */
  core_status (*allocate)(size_t bytes, void **out);
  void (*release)(void *pointer);
  /* Ordered on the stream; either side may be host or device memory. */
  core_status (*copy)(void *target, const void *source, size_t bytes, core_stream *stream);
  core_status (*fill)(void *target, int byte, size_t bytes, core_stream *stream);
  core_status (*stream_create)(core_stream **out);
  void (*stream_destroy)(core_stream *stream);
  core_status (*stream_wait)(core_stream *stream); /* host waits until all work so far is done */
  core_status (*event_create)(core_event **out);
  void (*event_destroy)(core_event *event);
  core_status (*event_record)(core_event *event, core_stream *stream);
  core_status (*event_query)(core_event *event, bool *done);
  core_status (*event_before)(core_stream *stream, core_event *event); /* stream waits for event */
} core_device;

#endif
