/* Device interface: memory, copies, streams and events of one processor kind. kernels/ implements it
 * (kern_device_cpu, later CUDA); comm and checkpoint receive a pointer and need not know which it is. */
#ifndef CORE_DEVICE_H
#define CORE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>

#include "core/status.h"

typedef enum core_device_kind { CORE_DEVICE_CPU, CORE_DEVICE_CUDA } core_device_kind;

/* Opaque handles of the implementation; NULL is the device's main stream, on which kernels run. A core_stream
 * of the CUDA device is a cudaStream_t. */
typedef struct core_stream core_stream;
typedef struct core_event core_event;

typedef struct core_device {
  core_device_kind kind;
  const char *name; /* for messages: "cpu", "cuda:0 NVIDIA H100" */
  bool host_access; /* the CPU may read and write this memory directly */

  /* 64-byte aligned, uninitialised. Errors: ERR_MEMORY. */
  core_status (*allocate)(size_t bytes, void **out);
  void (*release)(void *pointer);
  /* Host memory that the device copies to and from at full speed (page-locked). Errors: ERR_MEMORY. */
  core_status (*host_allocate)(size_t bytes, void **out);
  void (*host_release)(void *pointer);
  /* Bytes that could still be allocated, and bytes in all; 0 where unknown. */
  core_status (*memory)(size_t *available, size_t *total);
  /* Ordered on the stream; either side may be host or device memory. A copy to host memory returns when the
   * bytes are there; a copy from host memory returns when the source may be changed. */
  core_status (*copy)(void *target, const void *source, size_t bytes, core_stream *stream);
  /* The same, but returns at once; host memory must be of host_allocate and stay as it is until the stream
   * has come so far. */
  core_status (*copy_later)(void *target, const void *source, size_t bytes, core_stream *stream);
  core_status (*fill)(void *target, int byte, size_t bytes, core_stream *stream);
  core_status (*stream_create)(core_stream **out);
  void (*stream_destroy)(core_stream *stream);
  core_status (*stream_wait)(core_stream *stream); /* host waits until all work so far is done */
  core_status (*event_create)(core_event **out);
  void (*event_destroy)(core_event *event);
  core_status (*event_record)(core_event *event, core_stream *stream);
  core_status (*event_query)(core_event *event, bool *done);
  core_status (*event_before)(core_stream *stream, core_event *event); /* stream waits for event */
  /* Called again and again while the host waits for the device (stream_wait, copies to the host); a failure
   * ends the wait with that status. comm polls for asynchronous errors and deadlines there. NULL: none. */
  void (*watch)(core_status (*poll)(void *), void *context);
} core_device;

#endif
