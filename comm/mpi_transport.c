/* The MPI transport: non-blocking sends and receives, polled under a deadline. Host memory. */
#include <mpi.h>
#include <sched.h> /* sched_yield */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_impl.h"
#include "core/clock.h"

enum { TAG_DATA = 1, TAG_ASK = 2, TAG_ANSWER = 3, SPINS = 2000 };
static const double answer_seconds = 2.0;

/* All ranks of the world: what groups are made of, and the watchdog's questions. */
typedef struct mpi_world {
  MPI_Comm base, watch;
} mpi_world;

typedef struct mpi_group {
  MPI_Comm comm;
  MPI_Request *request;
  MPI_Status *result; /* of each request, once all are done */
  int32_t *peer;      /* of each request */
  int32_t capacity;
} mpi_group;

static core_status mpi_check(int code, const char *what) {
  if (code == MPI_SUCCESS) return CORE_OK;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  FAIL(CORE_ERR_COMM, "%s: %s", what, text);
}

bool comm_mpi_launched_priv(int32_t *tasks_without_pmix) {
  int started = 0;
  MPI_Initialized(&started);
  *tasks_without_pmix = 0;
  if (started || getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMIX_RANK") || getenv("PMI_RANK")) return true;
  const char *step = getenv("SLURM_STEP_NUM_TASKS");
  *tasks_without_pmix = step ? (int32_t)strtol(step, NULL, 10) : 0;
  return false;
}

static core_status group_from(comm_world *world, MPI_Comm comm, const char *name, comm_group **out) {
  int rank = 0, size = 0;
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_size(comm, &size);
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  TRY(comm_group_allocate_priv(world, &comm_transport_mpi_priv, name, rank, size, out));
  mpi_group *state = calloc(1, sizeof *state);
  CHECK(state, CORE_ERR_MEMORY, "no memory for the group '%s'", name);
  (*out)->private = state;
  state->comm = comm;
  state->capacity = 4 * size + 64;
  state->request = malloc((size_t)state->capacity * sizeof *state->request);
  state->result = malloc((size_t)state->capacity * sizeof *state->result);
  state->peer = malloc((size_t)state->capacity * sizeof *state->peer);
  CHECK(state->request && state->result && state->peer, CORE_ERR_MEMORY, "no memory for the group '%s'",
        name);
  int mine = world->rank;
  TRY(mpi_check(MPI_Allgather(&mine, 1, MPI_INT, (*out)->world_rank, 1, MPI_INT, comm), "MPI_Allgather"));
  return CORE_OK;
}

static core_status duplicate(const char *name, comm_world *world, comm_group **out) {
  MPI_Comm comm;
  const mpi_world *state = world->private;
  TRY(mpi_check(MPI_Comm_dup(state->base, &comm), "MPI_Comm_dup"));
  TRY(group_from(world, comm, name, out));
  return CORE_OK;
}

/* The world's communicators, from one of all its ranks. */
static core_status make_groups(comm_world *world, MPI_Comm base) {
  mpi_world *state = calloc(1, sizeof *state);
  CHECK(state, CORE_ERR_MEMORY, "no memory for communication");
  world->private = state;
  state->base = base;
  TRY(mpi_check(MPI_Comm_dup(base, &state->watch), "MPI_Comm_dup"));
  MPI_Comm_set_errhandler(state->watch, MPI_ERRORS_RETURN);
  TRY(duplicate("world", world, &world->world_group));
  TRY(duplicate("control", world, &world->control_group));
  return CORE_OK;
}

core_status comm_mpi_start_priv(comm_world *world) {
  int started = 0, provided = 0, rank = 0, size = 0, local_rank = 0, local_size = 0;
  MPI_Initialized(&started);
  world->owns_mpi = !started;
  if (!started)
    TRY(mpi_check(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread"));
  world->mpi = true;
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm node;
  TRY(mpi_check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node),
                "MPI_Comm_split_type"));
  MPI_Comm_rank(node, &local_rank);
  MPI_Comm_size(node, &local_size);
  MPI_Comm_free(&node);
  world->rank = rank;
  world->size = size;
  world->local_rank = local_rank;
  world->local_size = local_size;
  TRY(make_groups(world, MPI_COMM_WORLD));
  return CORE_OK;
}

core_status comm_mpi_part_priv(comm_world *world, int32_t color, comm_world *part) {
  const mpi_world *state = world->private;
  MPI_Comm base;
  int rank = 0, size = 0;
  int code = MPI_Comm_split(state->base, color < 0 ? MPI_UNDEFINED : color, world->rank, &base);
  TRY(mpi_check(code, "MPI_Comm_split"));
  if (base == MPI_COMM_NULL) return CORE_OK;
  MPI_Comm_set_errhandler(base, MPI_ERRORS_RETURN);
  MPI_Comm_rank(base, &rank);
  MPI_Comm_size(base, &size);
  part->mpi = true;
  part->rank = rank;
  part->size = size;
  TRY(make_groups(part, base));
  return CORE_OK;
}

void comm_mpi_finish_priv(comm_world *world) {
  mpi_world *state = world->private;
  if (world->part && state) {
    MPI_Comm_free(&state->watch);
    MPI_Comm_free(&state->base);
  }
  free(state);
  if (world->owns_mpi) MPI_Finalize();
}

void comm_mpi_abort_priv(void) {
  MPI_Abort(MPI_COMM_WORLD, 1);
  _Exit(1); /* MPI_Abort does not return; the compiler does not know */
}

core_status comm_mpi_split_priv(comm_world *world, int32_t color, const char *name, comm_group **out) {
  MPI_Comm comm;
  const mpi_world *state = world->private;
  int result = MPI_Comm_split(state->base, color < 0 ? MPI_UNDEFINED : color, world->rank, &comm);
  TRY(mpi_check(result, "MPI_Comm_split"));
  if (comm != MPI_COMM_NULL) TRY(group_from(world, comm, name, out));
  return CORE_OK;
}

static void mpi_group_destroy(comm_group *group) {
  mpi_group *state = group->private;
  if (!state) return;
  if (group->world->owns_mpi || group->world->part) MPI_Comm_free(&state->comm);
  free(state->request);
  free(state->result);
  free(state->peer);
  free(state);
}

void comm_mpi_answer_priv(const comm_world *world, const comm_place *here) {
  const mpi_world *state = world->private;
  int there = 0;
  MPI_Status status;
  if (!world->mpi) return;
  while (MPI_Iprobe(MPI_ANY_SOURCE, TAG_ASK, state->watch, &there, &status) == MPI_SUCCESS && there) {
    char question;
    comm_place place = *here;
    MPI_Recv(&question, 1, MPI_BYTE, status.MPI_SOURCE, TAG_ASK, state->watch, MPI_STATUS_IGNORE);
    MPI_Request request;
    MPI_Isend(&place, sizeof place, MPI_BYTE, status.MPI_SOURCE, TAG_ANSWER, state->watch, &request);
    int done = 0;
    for (int i = 0; i < 1000 && !done; i++) MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (!done) MPI_Request_free(&request);
  }
}

void comm_mpi_ask_priv(const comm_world *world, const comm_place *here, bool *answered, comm_place *place) {
  const mpi_world *state = world->private;
  static const char question = 1;
  if (!world->mpi) return;
  for (int32_t r = 0; r < world->size; r++) {
    MPI_Request request;
    if (r == world->rank) continue;
    MPI_Isend(&question, 1, MPI_BYTE, r, TAG_ASK, state->watch, &request);
    MPI_Request_free(&request);
  }
  double until = core_clock_now() + answer_seconds;
  while (core_clock_now() < until) {
    int there = 0;
    MPI_Status status;
    comm_mpi_answer_priv(world, here);
    MPI_Iprobe(MPI_ANY_SOURCE, TAG_ANSWER, state->watch, &there, &status);
    if (!there) {
      sched_yield();
      continue;
    }
    int r = status.MPI_SOURCE;
    MPI_Recv(&place[r], sizeof *place, MPI_BYTE, r, TAG_ANSWER, state->watch, MPI_STATUS_IGNORE);
    answered[r] = true;
  }
}

static void answer_questions(const comm_group *group) {
  comm_place here;
  comm_place_now_priv(group, &here);
  comm_mpi_answer_priv(group->world, &here);
}

static core_status over_deadline(comm_group *group, int32_t count) {
  mpi_group *state = group->private;
  comm_place here;
  bool *pending = calloc((size_t)group->size, sizeof *pending);
  CHECK(pending, CORE_ERR_MEMORY, "no memory for the watchdog");
  for (int32_t i = 0; i < count; i++)
    if (state->request[i] != MPI_REQUEST_NULL) pending[state->peer[i]] = true;
  comm_place_now_priv(group, &here);
  core_status result = comm_watchdog_over_priv(group, &here, pending);
  free(pending);
  return core_error_trace(result, __func__, __FILE__, __LINE__);
}

/* The first request that failed by itself says more than that one did. */
static core_status request_error(const mpi_group *state, int32_t count, int code) {
  char what[64] = "waiting for other ranks";
  for (int32_t i = 0; i < count && code == MPI_ERR_IN_STATUS; i++) {
    int error = state->result[i].MPI_ERROR;
    if (error == MPI_SUCCESS || error == MPI_ERR_PENDING) continue;
    snprintf(what, sizeof what, "a message of peer %d", state->peer[i]);
    code = error;
  }
  TRY(mpi_check(code, what));
  return CORE_OK;
}

static core_status wait_all(comm_group *group, int32_t count) {
  mpi_group *state = group->private;
  double start = 0;
  for (int64_t spin = 0;; spin++) {
    int done = 0;
    int code = MPI_Testall(count, state->request, &done, state->result);
    if (code != MPI_SUCCESS) TRY(request_error(state, count, code));
    if (done) return CORE_OK;
    if (spin < SPINS) continue;
    sched_yield();
    if (spin % 64 != 0) continue;
    double now = core_clock_now();
    if (start == 0) start = now;
    if (now - start > 0.5) answer_questions(group);
    if (now - start > group->world->deadline) return over_deadline(group, count);
  }
}

static core_status reserve(mpi_group *state, int64_t count) {
  if (count <= state->capacity) return CORE_OK;
  int32_t capacity = (int32_t)(2 * count);
  MPI_Request *request = realloc(state->request, (size_t)capacity * sizeof *request);
  if (request) state->request = request;
  MPI_Status *result = realloc(state->result, (size_t)capacity * sizeof *result);
  if (result) state->result = result;
  int32_t *peer = realloc(state->peer, (size_t)capacity * sizeof *peer);
  if (peer) state->peer = peer;
  CHECK(request && result && peer, CORE_ERR_MEMORY, "no memory for %lld messages", (long long)count);
  state->capacity = capacity;
  return CORE_OK;
}

static int64_t messages(const comm_group *group, const comm_piece *piece, int32_t count) {
  int64_t total = 0, most = group->world->largest_message;
  for (int32_t i = 0; i < count; i++)
    if (piece[i].peer != group->rank) total += (piece[i].bytes + most - 1) / most;
  return total;
}

/* Posts one side. Messages between two ranks keep their order, so pieces need no tags of their own. */
static core_status post(const comm_group *group, const comm_piece *piece, int32_t count, bool sending,
                        int32_t *posted) {
  mpi_group *state = group->private;
  int64_t most = group->world->largest_message;
  for (int32_t i = 0; i < count; i++) {
    int peer = piece[i].peer;
    if (peer == group->rank) continue;
    for (int64_t done = 0; done < piece[i].bytes; done += most) {
      int64_t left = piece[i].bytes - done;
      int bytes = (int)(left < most ? left : most);
      char *data = (char *)piece[i].data + done;
      MPI_Request *request = &state->request[*posted];
      int code = sending ? MPI_Isend(data, bytes, MPI_BYTE, peer, TAG_DATA, state->comm, request)
                         : MPI_Irecv(data, bytes, MPI_BYTE, peer, TAG_DATA, state->comm, request);
      TRY(mpi_check(code, sending ? "MPI_Isend" : "MPI_Irecv"));
      state->peer[(*posted)++] = peer;
    }
  }
  return CORE_OK;
}

/* MPI refuses longer messages than expected by itself, shorter ones it leaves to us. Receives were posted
 * first. */
static core_status check_received(const comm_group *group, const comm_piece *recv, int32_t count) {
  const mpi_group *state = group->private;
  int64_t most = group->world->largest_message;
  int32_t at = 0;
  for (int32_t i = 0; i < count; i++) {
    if (recv[i].peer == group->rank) continue;
    for (int64_t done = 0; done < recv[i].bytes; done += most, at++) {
      int64_t left = recv[i].bytes - done, expected = left < most ? left : most;
      int got = 0;
      MPI_Get_count(&state->result[at], MPI_BYTE, &got);
      CHECK(got == expected, CORE_ERR_COMM, "group '%s': rank %d sent %d bytes where %lld were expected",
            group->name, group->world_rank[recv[i].peer], got, (long long)expected);
    }
  }
  return CORE_OK;
}

static core_status mpi_exchange(comm_group *group, const comm_piece *send, int32_t send_count,
                                const comm_piece *recv, int32_t recv_count) {
  int32_t posted = 0;
  TRY(reserve(group->private, messages(group, send, send_count) + messages(group, recv, recv_count)));
  TRY(post(group, recv, recv_count, false, &posted));
  TRY(post(group, send, send_count, true, &posted));
  TRY(wait_all(group, posted));
  TRY(check_received(group, recv, recv_count));
  return CORE_OK;
}

const comm_transport comm_transport_mpi_priv = {
    .name = "mpi", .exchange = mpi_exchange, .group_destroy = mpi_group_destroy};
