/* What the files of comm/ share. On host memory everything is built on one transport operation, the exchange;
 * memory of a device has some of its own. */
#ifndef COMM_COMM_IMPL_H
#define COMM_COMM_IMPL_H

#include <pthread.h>

#include "comm/comm.h"

enum { COMM_NAME = 48, COMM_MAX_GROUPS = 64 };

typedef struct comm_transport {
  const char *name;
  /* As comm_exchange; pieces to oneself are already done. */
  core_status (*exchange)(comm_group *group, const comm_piece *send, int32_t send_count,
                          const comm_piece *recv, int32_t recv_count);
  void (*group_destroy)(comm_group *group);
} comm_transport;

/* Operations on memory of a device. Arguments are checked, pieces have bytes, counts are not all 0. */
typedef struct comm_device_ops {
  const char *name;
  core_status (*exchange)(comm_group *group, const comm_piece *send, int32_t send_count,
                          const comm_piece *recv, int32_t recv_count, core_stream *stream);
  /* NULL: it is an exchange. */
  core_status (*all_to_all)(comm_group *group, const void *send, void *recv, int64_t bytes,
                            core_stream *stream);
  core_status (*all_reduce)(comm_group *group, comm_reduction operation, core_dtype dtype, void *data,
                            int64_t count, core_stream *stream);
  core_status (*reduce_scatter)(comm_group *group, core_dtype dtype, void *data, const int64_t *count,
                                core_stream *stream);
  core_status (*all_gather)(comm_group *group, void *data, const int64_t *bytes, core_stream *stream);
  /* Failures of the transport that arose by themselves. NULL: none. Local. */
  core_status (*check)(comm_group *group);
  /* Drops whatever is under way, because the job ends. May hang. NULL: nothing to drop. Local. */
  void (*abort)(comm_group *group);
  void (*destroy)(comm_group *group);
} comm_device_ops;

typedef struct comm_pending comm_pending;

struct comm_group {
  comm_world *world;
  const comm_transport *transport;
  char name[COMM_NAME];
  int32_t rank, size;
  int32_t *world_rank;    /* [size] */
  void *private;          /* of the transport */
  unsigned char *scratch; /* [size][piece] for reductions */
  int64_t piece;
  int64_t *first, *slice; /* [size] each, for reductions: elements of a round */
  comm_piece *list;       /* [2 * size] for the operations built on exchange */
  int64_t sequence;       /* exchanges so far; equal on all ranks */
  const char *operation;  /* what the current exchange serves, for messages */
  double seconds;
  int64_t bytes;
  const core_device *device;         /* NULL until comm_group_device */
  const comm_device_ops *device_ops; /* NULL where the host reaches the device's memory */
  void *device_private;              /* of the device transport */
  comm_pending *pending;             /* what the device has been given; NULL: nothing stays behind */
};

/* Where a rank is, as it answers a rank whose deadline passed. */
typedef struct comm_place {
  int64_t step, sequence;
  int32_t rank, layer;
  char phase[COMM_NAME], operation[COMM_NAME], group[COMM_NAME];
} comm_place;

struct comm_world {
  int32_t rank, size, local_rank, local_size;
  bool mpi;      /* MPI is in use */
  bool owns_mpi; /* and was started here */
  bool part;     /* of another world, which ends MPI */
  double deadline;
  bool overdue;            /* a deadline has passed: every further wait fails at once */
  int64_t largest_message; /* bytes; larger pieces go in several messages */
  char directory[512];
  comm_group *group[COMM_MAX_GROUPS];
  int32_t group_count;
  comm_group *world_group, *control_group;
  int64_t step;
  int32_t layer;
  const char *phase;
  const core_device *watched; /* calls comm_device_poll_priv while the host waits for it */
  int64_t polls;
  void *private; /* of the MPI transport */
};

extern const comm_transport comm_transport_self_priv;
extern const comm_transport comm_transport_mpi_priv;

/* Makes a group object around ranks that are known; the transport fills `private`. */
core_status comm_group_allocate_priv(comm_world *world, const comm_transport *transport, const char *name,
                                     int32_t rank, int32_t size, comm_group **out);

/* group.c. The exchange under the name of what it serves; its lists may hold pieces to oneself. */
core_status comm_exchange_as_priv(comm_group *group, const char *operation, const comm_piece *send,
                                  int32_t send_count, const comm_piece *recv, int32_t recv_count);
core_status comm_check_pieces_priv(const comm_group *group, const char *side, const comm_piece *piece,
                                   int32_t count);
core_status comm_check_reduction_priv(core_dtype dtype, int64_t count);
/* comm_device_reduce_scatter on host memory. */
core_status comm_reduce_scatter_priv(comm_group *group, core_dtype dtype, void *data, const int64_t *count);

/* device_group.c. Copies pieces to oneself on the stream. */
core_status comm_device_copy_own_priv(const comm_group *group, const comm_piece *send, int32_t send_count,
                                      const comm_piece *recv, int32_t recv_count, core_stream *stream);

/* staged_transport.c: page-locked memory of `staging` bytes for each direction. nccl_transport.c: why NCCL
 * cannot serve the group is written to `reason` ("" where it can). Collective. */
core_status comm_staged_create_priv(comm_group *group, int64_t staging);
core_status comm_nccl_possible_priv(comm_group *group, char *reason, size_t capacity);
core_status comm_nccl_create_priv(comm_group *group);

/* device_watch.c: operations that a device has been given and not finished. Add records what was given to
 * `stream` so far as one operation of the group, under the place where this rank is. Local, but waits while
 * the list is full. */
core_status comm_pending_create_priv(comm_group *group);
void comm_pending_destroy_priv(comm_group *group);
core_status comm_pending_add_priv(comm_group *group, core_stream *stream);
/* Has the device call comm_device_poll_priv, and no longer. */
void comm_device_watch_priv(comm_world *world, const core_device *device);
void comm_device_unwatch_priv(comm_world *world);
/* Asynchronous errors (ERR_COMM) and operations that are over their deadline (ERR_TIMEOUT). */
core_status comm_device_poll_priv(void *world);
/* The same, for waits that know what they wait for: `since`: when they began, core_clock_now. */
core_status comm_device_overdue_priv(comm_group *group, const comm_place *here, double since);

/* mpi_transport.c */
bool comm_mpi_launched_priv(int32_t *tasks_without_pmix);
core_status comm_mpi_start_priv(comm_world *world);
/* Makes `part`, whose size is not known yet, the ranks of equal color >= 0. color < 0: only takes part in the
 * call. */
core_status comm_mpi_part_priv(comm_world *world, int32_t color, comm_world *part);

/* start_guard.c: ends this process with a sentence when MPI has not started within `deadline` seconds. */
typedef struct comm_start_guard {
  double deadline;
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t change;
  bool started, running;
} comm_start_guard;
CORE_NODISCARD core_status comm_start_guard_begin_priv(comm_start_guard *guard, double deadline);
void comm_start_guard_end_priv(comm_start_guard *guard);
void comm_mpi_finish_priv(comm_world *world);
core_status comm_mpi_split_priv(comm_world *world, int32_t color, const char *name, comm_group **out);
_Noreturn void comm_mpi_abort_priv(void);
/* Answers ranks whose deadline has passed: this one is `here`. Nothing without MPI. */
void comm_mpi_answer_priv(const comm_world *world, const comm_place *here);
/* Asks all other ranks where they are and takes the answers of two seconds. answered, place: [world size].
 * Ranks that also wait answer; ranks that are gone, stopped or computing do not. */
void comm_mpi_ask_priv(const comm_world *world, const comm_place *here, bool *answered, comm_place *place);

/* watchdog.c: turns the pending peers of a wait that is over its deadline into ERR_TIMEOUT. pending: [size];
 * answered, place: [world size] which ranks answered and from where. */
core_status comm_watchdog_report_priv(const comm_group *group, const comm_place *here, const bool *pending,
                                      const bool *answered, const comm_place *place);
void comm_place_now_priv(const comm_group *group, comm_place *out);
/* "step 12, layer 3, dispatch, all-reduce 5 of group 'world'" */
void comm_place_text_priv(const comm_place *place, char *out, size_t capacity);
/* Asks everybody, then reports those of `pending`; NULL: those that are not where this rank is. */
core_status comm_watchdog_over_priv(const comm_group *group, const comm_place *here, const bool *pending);

#endif
