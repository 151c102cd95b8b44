/* Groups of ranks and the operations on them. Transports: `self` (one rank, no MPI call) and `mpi` for host
 * memory; `nccl`, or staging through the former, for memory of a device.
 *
 * Every operation is Collective over its group, is issued in the same order on all its ranks, and has a
 * deadline. Waits poll: the deadline and the arrival of an error elsewhere. After a deadline or a transport
 * error nothing else is legal: the operation returns ERR_TIMEOUT or ERR_COMM and the caller ends with
 * comm_fail_stop. A rank with nothing to send still calls. Only the thread that called comm_start may
 * communicate. One communicator per group. */
#ifndef COMM_COMM_H
#define COMM_COMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/device.h" /* core_device, core_stream */
#include "core/status.h"
#include "core/tensor.h" /* core_dtype */

typedef struct comm_world comm_world;
typedef struct comm_group comm_group;

typedef struct comm_options {
  double deadline;       /* seconds that any wait may take; 0: 600 */
  const char *directory; /* where error.<rank>.json goes; NULL: none */
  bool alone;            /* comm_start only: a world of this process by itself, even under mpirun */
} comm_options;

/* Starts MPI when the process was launched by mpirun or srun (or MPI is already running); otherwise a world
 * of one without MPI. Collective over all processes of the job. */
CORE_NODISCARD core_status comm_start(const comm_options *options, comm_world **out);
/* A world of its own for the ranks of equal `color` >= 0, ordered as in `world`; color < 0: none, *out =
 * NULL. What it does is seen by its ranks alone: groups, agreement, deadlines; ranks are numbered within it,
 * except that comm_local_rank still counts all of the host. comm_fail_stop in it ends the whole job. Its
 * ranks end it with comm_finish before `world` is ended; until then they use no group of `world`. Deadline
 * and directory are those of `world` until comm_configure. Collective over `world`. */
CORE_NODISCARD core_status comm_part(comm_world *world, int32_t color, comm_world **out);
/* Waits, without a deadline, for all ranks of `world`: others may have hours of work in a part of theirs,
 * which has its own deadline, and a rank that is lost ends the job. Collective. */
CORE_NODISCARD core_status comm_join(comm_world *world);
/* Changes deadline and directory once the configuration is known. `directory` is copied. */
CORE_NODISCARD core_status comm_configure(comm_world *world, const comm_options *options);
/* Ends MPI in order. Collective. Frees the world and every group. */
void comm_finish(comm_world *world);
/* Hard fault: writes error.<rank>.json, prints the record and ends the whole job (MPI_Abort; exit in a world
 * of one) with status 1. Local. Does not return. */
_Noreturn void comm_fail_stop(comm_world *world, core_status status);

comm_group *comm_world_group(comm_world *world);   /* all ranks, for the model */
comm_group *comm_control_group(comm_world *world); /* all ranks, for flags, agreement and checkpoints */
int32_t comm_rank(const comm_group *group);
int32_t comm_size(const comm_group *group);
int32_t comm_world_rank_of(const comm_group *group, int32_t rank);
int32_t comm_local_rank(const comm_world *world); /* among the ranks of this host */
int32_t comm_local_size(const comm_world *world);
const char *comm_transport_name(const comm_group *group);

/* Splits the world: ranks of equal `color` >= 0 form a group ordered by world rank; color < 0: no group, *out
 * = NULL. `name` ("expert", "replica", "modality image") is copied, for messages. Collective over the world.
 */
CORE_NODISCARD core_status comm_group_create(comm_world *world, int32_t color, const char *name,
                                             comm_group **out);

/* Frees a group before the world ends. NULL is allowed. Collective over the group. */
void comm_group_destroy(comm_group *group);

/* What the trainer is doing, for the watchdog's report: "step 12, layer 3, dispatch". layer < 0: none.
 * `phase` must be a string literal. Local, a few stores. */
void comm_note(comm_world *world, int64_t step, int32_t layer, const char *phase);

CORE_NODISCARD core_status comm_barrier(comm_group *group);
/* bytes at `data` from `root` to all. */
CORE_NODISCARD core_status comm_broadcast(comm_group *group, int32_t root, void *data, size_t bytes);

typedef enum comm_reduction { COMM_SUM, COMM_MAX, COMM_MIN } comm_reduction;
/* In place; FLOAT32, FLOAT64, INT32, INT64 or UINT64. The result is the same bit for bit on every rank, and
 * from run to run on one layout. */
CORE_NODISCARD core_status comm_all_reduce(comm_group *group, comm_reduction operation, core_dtype dtype,
                                           void *data, int64_t count);
/* Rank r contributes bytes[r] bytes (every rank knows all of them); they are concatenated in rank order in
 * `recv`. */
CORE_NODISCARD core_status comm_all_gather(comm_group *group, const void *send, const int64_t *bytes,
                                           void *recv);
/* Strings and records of unknown length to `root`: on root *recv is malloc'ed (caller frees) with offsets
 * int64 [size + 1] in *offset (malloc'ed); NULL elsewhere. */
CORE_NODISCARD core_status comm_gather_bytes(comm_group *group, int32_t root, const void *send, int64_t bytes,
                                             char **recv, int64_t **offset);

/* Ragged all-to-all: a list of pieces to send and a list to receive. The i-th piece that rank a sends to rank
 * b is received by the i-th piece that b expects from a; their sizes must agree (ERR_COMM on the receiver
 * otherwise; ERR_ARGUMENT for a peer outside the group or negative bytes). Zero-byte pieces must be
 * left out on both sides. Pieces of more than 2 GiB are legal. Pieces to oneself are copied. */
typedef struct comm_piece {
  int32_t peer;
  void *data;
  int64_t bytes;
} comm_piece;
CORE_NODISCARD core_status comm_exchange(comm_group *group, const comm_piece *send, int32_t send_count,
                                         const comm_piece *recv, int32_t recv_count);

/* ---- data in the memory of a device ----
 * The same operations on tensors of the backend. A group serves them once comm_group_device has told it where
 * they lie; on a device with host_access they are the operations above. On another one they are ordered on
 * `stream` (NULL: the device's main stream) and may return before they are done: what waits for the device
 * then sees their failures and their deadline (core_device.watch). */
typedef enum comm_device_transport {
  COMM_DEVICE_AUTO,  /* nccl where it is built in and every rank of the group has a device of its own, else
                        staged */
  COMM_DEVICE_NCCL,  /* ERR_UNSUPPORTED with the reason where that cannot be */
  COMM_DEVICE_STAGED /* through page-locked host memory and the group's own transport */
} comm_device_transport;
/* Collective over the group; to be called for every group in the same order on all its ranks. The choice made
 * by AUTO is logged once, with its reason. staging: bytes of page-locked memory for STAGED (each direction);
 * longer messages go in several parts. */
CORE_NODISCARD core_status comm_group_device(comm_group *group, const core_device *device,
                                             comm_device_transport transport, int64_t staging);
const char *comm_device_transport_name(
    const comm_group *group); /* "nccl", "staged", "host", "self" (one rank) */

CORE_NODISCARD core_status comm_device_exchange(comm_group *group, const comm_piece *send, int32_t send_count,
                                                const comm_piece *recv, int32_t recv_count,
                                                core_stream *stream);
/* Equal pieces: `bytes` at send + r bytes go to rank r, and what rank r sends comes to recv + r bytes. send
 * and recv: [size][bytes], apart. bytes is equal on all ranks. */
CORE_NODISCARD core_status comm_device_all_to_all(comm_group *group, const void *send, void *recv,
                                                  int64_t bytes, core_stream *stream);
CORE_NODISCARD core_status comm_device_all_reduce(comm_group *group, comm_reduction operation,
                                                  core_dtype dtype, void *data, int64_t count,
                                                  core_stream *stream);
/* data: [sum of count], rank r's range follows those of the ranks before it. Afterwards rank r's range holds
 * the sum over all ranks, in the order of comm_device_all_reduce where that is fixed; the rest of data is
 * undefined. count: [size], equal on all ranks. FLOAT32 or FLOAT64. */
CORE_NODISCARD core_status comm_device_reduce_scatter(comm_group *group, core_dtype dtype, void *data,
                                                      const int64_t *count, core_stream *stream);
/* In place: rank r's range of `data` (bytes[r], after those of the ranks before it) goes to all. */
CORE_NODISCARD core_status comm_device_all_gather(comm_group *group, void *data, const int64_t *bytes,
                                                  core_stream *stream);

/* Agreement on errors: every rank brings its status (and its thread's record); all return the same code,
 * that of the lowest rank among those with the highest code, and carry that rank's record. */
CORE_NODISCARD core_status comm_agree(comm_group *group, core_status local);
/* Agreement on one integer: ERR_MISMATCH naming `what` and two ranks when it differs. */
CORE_NODISCARD core_status comm_agree_value(comm_group *group, const char *what, uint64_t value);

/* Seconds spent waiting and bytes sent in operations of this group so far. */
double comm_group_seconds(const comm_group *group);
int64_t comm_group_bytes(const comm_group *group);

#endif
