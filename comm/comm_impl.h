/* What the files of comm/ share. Everything above is built on one transport operation, the exchange. */
#ifndef COMM_COMM_IMPL_H
#define COMM_COMM_IMPL_H

#include "comm/comm.h"

enum { COMM_NAME = 48, COMM_MAX_GROUPS = 64 };

typedef struct comm_transport {
  const char *name;
  /* As comm_exchange; pieces to oneself are already done. */
  core_status (*exchange)(comm_group *group, const comm_piece *send, int32_t send_count,
                          const comm_piece *recv, int32_t recv_count);
  void (*group_destroy)(comm_group *group);
} comm_transport;

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
  comm_piece *list;      /* [2 * size] for the operations built on exchange */
  int64_t sequence;      /* exchanges so far; equal on all ranks */
  const char *operation; /* what the current exchange serves, for messages */
  double seconds;
  int64_t bytes;
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
  double deadline;
  int64_t largest_message; /* bytes; larger pieces go in several messages */
  char directory[512];
  comm_group *group[COMM_MAX_GROUPS];
  int32_t group_count;
  comm_group *world_group, *control_group;
  int64_t step;
  int32_t layer;
  const char *phase;
  void *private; /* of the MPI transport */
};

extern const comm_transport comm_transport_self_priv;
extern const comm_transport comm_transport_mpi_priv;

/* Makes a group object around ranks that are known; the transport fills `private`. */
core_status comm_group_allocate_priv(comm_world *world, const comm_transport *transport, const char *name,
                                     int32_t rank, int32_t size, comm_group **out);

/* group.c; comm_device_reduce_scatter on host memory. */
core_status comm_reduce_scatter_priv(comm_group *group, core_dtype dtype, void *data, const int64_t *count);

/* mpi_transport.c */
bool comm_mpi_launched_priv(int32_t *tasks_without_pmix);
core_status comm_mpi_start_priv(comm_world *world);
void comm_mpi_finish_priv(comm_world *world);
core_status comm_mpi_split_priv(comm_world *world, int32_t color, const char *name, comm_group **out);
_Noreturn void comm_mpi_abort_priv(void);

/* watchdog.c: turns the pending peers of a wait that is over its deadline into ERR_TIMEOUT. `answered`,
 * `place`: [world size] which ranks answered and from where. */
core_status comm_watchdog_report_priv(const comm_group *group, const bool *pending, const bool *answered,
                                      const comm_place *place);
void comm_place_now_priv(const comm_group *group, comm_place *out);

#endif
