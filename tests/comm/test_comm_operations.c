/* Groups and operations at every rank count; expectations are computed by each rank from what all ranks
 * bring, which is a function of (rank, index). */
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "comm/comm_impl.h" /* the message limit and the size of a reduction's piece */
#include "core/clock.h"
#include "core/random.h"
#include "tests/comm/comm_expect.h"

static comm_group *world(void) {
  return comm_world_group(job);
}

static int32_t rank(void) {
  return comm_rank(world());
}

static int32_t size(void) {
  return comm_size(world());
}

static uint64_t value_of(uint64_t stream, int32_t r, int64_t i) {
  return core_random_u64(99 + (uint64_t)r, stream, (uint64_t)i);
}

/* ---- groups ---- */

static void the_world_knows_its_ranks(void **state) {
  (void)state;
  EXPECT(rank() >= 0 && rank() < size());
  EXPECT(comm_rank(comm_control_group(job)) == rank() && comm_size(comm_control_group(job)) == size());
  for (int32_t r = 0; r < size(); r++) EXPECT(comm_world_rank_of(world(), r) == r);
  EXPECT(comm_local_size(job) == size() && comm_local_rank(job) == rank()); /* one host */
  EXPECT(strcmp(comm_transport_name(world()), size() > 1 ? "mpi" : "self") == 0);
  EXPECT(core_error_get()->rank == rank() || core_error_get()->code == CORE_OK);
}

static void sum_of_ranks(comm_group *group, int64_t *sum) {
  *sum = rank();
  EXPECT_OK(comm_all_reduce(group, COMM_SUM, CORE_INT64, sum, 1));
}

static void the_world_splits_by_colour_in_the_order_of_ranks(void **state) {
  (void)state;
  comm_group *parity = NULL, *half = NULL, *single = NULL, *none = (comm_group *)job;
  EXPECT_OK(comm_group_create(job, rank() % 2, "parity", &parity));
  EXPECT_OK(comm_group_create(job, rank() / ((size() + 1) / 2), "half", &half));
  EXPECT_OK(comm_group_create(job, 100 - rank(), "single", &single));
  EXPECT_OK(comm_group_create(job, rank() == 0 ? 5 : -1, "first", &none));
  EXPECT((none != NULL) == (rank() == 0));
  EXPECT(comm_size(single) == 1 && comm_rank(single) == 0 && comm_world_rank_of(single, 0) == rank());
  int64_t sum = 0, expected = 0;
  EXPECT(comm_size(parity) == (size() + 1 - rank() % 2) / 2 && comm_rank(parity) == rank() / 2);
  for (int32_t r = 0; r < comm_size(parity); r++) {
    EXPECT(comm_world_rank_of(parity, r) == 2 * r + rank() % 2);
    expected += 2 * r + rank() % 2;
  }
  sum_of_ranks(parity, &sum);
  EXPECT(sum == expected);
  sum_of_ranks(single, &sum);
  EXPECT(sum == rank());
  /* the halves run different numbers of operations */
  for (int i = 0; i < 3 + 4 * (rank() / ((size() + 1) / 2)); i++) sum_of_ranks(half, &sum);
  sum_of_ranks(world(), &sum);
  EXPECT(sum == (int64_t)size() * (size() - 1) / 2);
  comm_group_destroy(parity);
  comm_group_destroy(half);
  comm_group_destroy(single);
  comm_group_destroy(none);
  comm_group_destroy(NULL);
}

static void groups_are_limited_and_can_be_given_back(void **state) {
  (void)state;
  comm_group *list[COMM_MAX_GROUPS];
  for (int round = 0; round < 2; round++) {
    int count = 0;
    core_status status = CORE_OK;
    while (count < COMM_MAX_GROUPS && status == CORE_OK) {
      status = comm_group_create(job, 0, "one of many", &list[count]);
      count += status == CORE_OK;
    }
    EXPECT_ERROR(status, CORE_ERR_ARGUMENT, "more than 64 groups");
    EXPECT(count == COMM_MAX_GROUPS - 2);
    for (int i = 0; i < count; i++) comm_group_destroy(list[(i * 7) % count]);
  }
}

/* The first rank alone, the others together; the last of four takes no part. */
static void parts_of_a_world_are_worlds(void **state) {
  (void)state;
  comm_world *part = NULL;
  comm_group *inner = NULL;
  const bool idle = size() == 4 && rank() == 3;
  const int32_t members = rank() == 0 ? 1 : size() - 1 - (size() == 4);
  EXPECT_OK(comm_part(job, idle ? -1 : rank() > 0, &part));
  EXPECT((part == NULL) == idle);
  if (part) {
    comm_group *group = comm_world_group(part);
    EXPECT(comm_size(group) == members && comm_rank(group) == (rank() == 0 ? 0 : rank() - 1));
    EXPECT(comm_world_rank_of(group, comm_rank(group)) == comm_rank(group));
    EXPECT(comm_local_rank(part) == comm_local_rank(job) && comm_local_size(part) == comm_local_size(job));
    int64_t sum = rank() + 1;
    EXPECT_OK(comm_all_reduce(group, COMM_SUM, CORE_INT64, &sum, 1));
    EXPECT(sum == (rank() == 0 ? 1 : members == 2 ? 5 : 2));
    EXPECT_OK(comm_group_create(part, 0, "inner", &inner));
    EXPECT(comm_size(inner) == members);
    /* agreement stays within the part */
    core_status own = CORE_OK;
    if (rank() == 0) own = core_error_begin(CORE_ERR_FORMAT, __func__, __FILE__, __LINE__, "mine");
    EXPECT(comm_agree(comm_control_group(part), own) == (rank() == 0 ? CORE_ERR_FORMAT : CORE_OK));
    core_error_clear();
    comm_finish(part);
  }
  EXPECT_OK(comm_join(job));
}

static void a_process_can_be_a_world_by_itself(void **state) {
  (void)state;
  const comm_options options = {.deadline = 5, .alone = true};
  comm_world *own = NULL;
  int64_t sum = 7;
  EXPECT_OK(comm_start(&options, &own));
  EXPECT(comm_size(comm_world_group(own)) == 1 && comm_rank(comm_world_group(own)) == 0);
  EXPECT(strcmp(comm_transport_name(comm_world_group(own)), "self") == 0);
  EXPECT_OK(comm_all_reduce(comm_world_group(own), COMM_SUM, CORE_INT64, &sum, 1));
  EXPECT(sum == 7);
  comm_finish(own);
}

/* ---- barrier, broadcast ---- */

static void nobody_leaves_a_barrier_before_all_have_come(void **state) {
  (void)state;
  double times[2] = {0, 0}, all[2 * 64];
  int64_t bytes[64];
  core_clock_sleep(0.02 * ((rank() * 3 + 1) % size()));
  times[0] = core_clock_now();
  EXPECT_OK(comm_barrier(world()));
  times[1] = core_clock_now();
  for (int32_t r = 0; r < size(); r++) bytes[r] = sizeof times;
  EXPECT_OK(comm_all_gather(world(), times, bytes, all));
  for (int32_t a = 0; a < size(); a++)
    for (int32_t b = 0; b < size(); b++) EXPECT(all[2 * a + 1] >= all[2 * b]); /* one host, one clock */
}

static void a_broadcast_reaches_all_from_every_root(void **state) {
  (void)state;
  static const size_t sizes[] = {0, 1, 3, 1001, 5000011};
  for (int i = 0; i < 5; i++)
    for (int32_t root = 0; root < size(); root++) {
      unsigned char *data = malloc(sizes[i] + 1);
      EXPECT(data != NULL);
      memset(data, rank() == root ? 0x5a : 0x11, sizes[i] + 1);
      if (rank() == root)
        for (size_t k = 0; k < sizes[i]; k++) data[k] = (unsigned char)(k * 7 + (size_t)root);
      EXPECT_OK(comm_broadcast(world(), root, data, sizes[i]));
      for (size_t k = 0; k < sizes[i]; k++) EXPECT(data[k] == (unsigned char)(k * 7 + (size_t)root));
      EXPECT(data[sizes[i]] == (rank() == root ? 0x5a : 0x11));
      free(data);
    }
}

/* ---- all-reduce ---- */

static void fill(core_dtype dtype, void *data, int64_t count, int32_t r, uint64_t stream) {
  for (int64_t i = 0; i < count; i++) {
    uint64_t bits = value_of(stream, r, i);
    double real = ldexp((double)(int64_t)bits, (int)(bits % 40) - 70); /* of very different sizes */
    if (dtype == CORE_FLOAT32) ((float *)data)[i] = (float)real;
    if (dtype == CORE_FLOAT64) ((double *)data)[i] = real;
    if (dtype == CORE_INT32) ((int32_t *)data)[i] = (int32_t)(bits >> 36) - (1 << 27);
    if (dtype == CORE_INT64) ((int64_t *)data)[i] = (int64_t)(bits >> 4) - ((int64_t)1 << 59);
    if (dtype == CORE_UINT64) ((uint64_t *)data)[i] = bits; /* sums wrap */
  }
}

#define REFERENCE(type)                                      \
  do {                                                       \
    type *a = target;                                        \
    const type *b = source;                                  \
    for (int64_t i = 0; i < count; i++) {                    \
      if (operation == COMM_SUM) a[i] = (type)(a[i] + b[i]); \
      if (operation == COMM_MAX && b[i] > a[i]) a[i] = b[i]; \
      if (operation == COMM_MIN && b[i] < a[i]) a[i] = b[i]; \
    }                                                        \
  } while (0)

static void reference_add(comm_reduction operation, core_dtype dtype, void *target, const void *source,
                          int64_t count) {
  if (dtype == CORE_FLOAT32) REFERENCE(float);
  if (dtype == CORE_FLOAT64) REFERENCE(double);
  if (dtype == CORE_INT32) REFERENCE(int32_t);
  if (dtype == CORE_INT64) REFERENCE(int64_t);
  if (dtype == CORE_UINT64) REFERENCE(uint64_t);
}

/* Bit for bit the sum in the order of ranks, hence the same on every rank and in every run. */
static void check_reduce(comm_group *group, comm_reduction operation, core_dtype dtype, int64_t count) {
  size_t width = core_dtype_size(dtype), bytes = (size_t)count * width;
  char *data = malloc(bytes + 8), *expected = malloc(bytes + 8), *other = malloc(bytes + 8);
  uint64_t stream = (uint64_t)count * 31 + (uint64_t)dtype;
  EXPECT(data && expected && other);
  memset(data + bytes, 0x77, 8);
  fill(dtype, data, count, rank(), stream);
  fill(dtype, expected, count, comm_world_rank_of(group, 0), stream);
  for (int32_t r = 1; r < comm_size(group); r++) {
    fill(dtype, other, count, comm_world_rank_of(group, r), stream);
    reference_add(operation, dtype, expected, other, count);
  }
  EXPECT_OK(comm_all_reduce(group, operation, dtype, data, count));
  EXPECT(memcmp(data, expected, bytes) == 0);
  for (int i = 0; i < 8; i++) EXPECT(data[bytes + (size_t)i] == 0x77);
  free(data);
  free(expected);
  free(other);
}

static void reductions_give_the_bits_of_a_sum_in_rank_order(void **state) {
  (void)state;
  static const core_dtype dtypes[] = {CORE_FLOAT32, CORE_FLOAT64, CORE_INT32, CORE_INT64, CORE_UINT64};
  static const comm_reduction operations[] = {COMM_SUM, COMM_MAX, COMM_MIN};
  static const int64_t counts[] = {0, 1, 2, 3, 5, 1001, 65537};
  for (int d = 0; d < 5; d++)
    for (int o = 0; o < 3; o++)
      for (int c = 0; c < 7; c++) check_reduce(world(), operations[o], dtypes[d], counts[c]);
}

static void reductions_of_several_pieces_are_the_same(void **state) {
  (void)state;
  int64_t round = world()->piece * size() / 4; /* elements of one round */
  if (round == 0) round = 1 << 20;
  static const int64_t around[] = {-1, 0, 1};
  for (int i = 0; i < 3; i++) check_reduce(world(), COMM_SUM, CORE_FLOAT32, round + around[i]);
  check_reduce(world(), COMM_SUM, CORE_FLOAT32, 2 * round + 17);
  check_reduce(world(), COMM_SUM, CORE_FLOAT64, round + 3);
  comm_group *parity = NULL;
  EXPECT_OK(comm_group_create(job, rank() % 2, "parity", &parity));
  check_reduce(parity, COMM_SUM, CORE_FLOAT32, 300001);
  comm_group_destroy(parity);
}

/* ---- gathers ---- */

static void an_all_gather_takes_any_sizes_and_none(void **state) {
  (void)state;
  int64_t bytes[64] = {0};
  for (int pattern = 0; pattern < 5; pattern++) {
    int64_t total = 0, own = 0;
    for (int32_t r = 0; r < size(); r++) {
      bytes[r] = pattern == 0   ? 0
                 : pattern == 1 ? 8
                 : pattern == 2 ? (r == 0 ? 0 : r * 1001)
                 : pattern == 3 ? (r == size() - 1 ? 70000 : 0)
                                : 300000 - r;
      if (r == rank()) own = total;
      total += bytes[r];
    }
    unsigned char *recv = malloc((size_t)total + 1), *send = malloc((size_t)bytes[rank()] + 1);
    EXPECT(recv && send);
    recv[total] = 0x33;
    for (int64_t i = 0; i < bytes[rank()]; i++) send[i] = (unsigned char)value_of(7, rank(), i);
    EXPECT_OK(comm_all_gather(world(), send, bytes, recv));
    EXPECT(memcmp(recv + own, send, (size_t)bytes[rank()]) == 0);
    unsigned char *at = recv;
    for (int32_t r = 0; r < size(); r++)
      for (int64_t i = 0; i < bytes[r]; i++) EXPECT(*at++ == (unsigned char)value_of(7, r, i));
    EXPECT(recv[total] == 0x33);
    if (bytes[rank()] > 0) { /* the own part may already lie in its place */
      EXPECT_OK(comm_all_gather(world(), recv + own, bytes, recv));
    } else {
      EXPECT_OK(comm_all_gather(world(), NULL, bytes, recv));
    }
    free(recv);
    free(send);
  }
}

static void records_of_unknown_length_come_to_the_root(void **state) {
  (void)state;
  for (int32_t root = 0; root < size(); root++)
    for (int empty = 0; empty < 3; empty++) { /* none, every other, all */
      char text[64], *all = (char *)text;
      int64_t *offset = (int64_t *)(void *)text;
      bool silent = empty == 2 || (empty == 1 && rank() % 2 == 0);
      int64_t bytes = silent ? 0 : snprintf(text, sizeof text, "rank %d says %0*d;", rank(), rank() + 1, 7);
      EXPECT_OK(comm_gather_bytes(world(), root, text, bytes, &all, &offset));
      EXPECT((all != NULL) == (rank() == root) && (offset != NULL) == (rank() == root));
      for (int32_t r = 0; r < size() && all; r++) {
        char expected[64] = "";
        if (!(empty == 2 || (empty == 1 && r % 2 == 0)))
          snprintf(expected, sizeof expected, "rank %d says %0*d;", r, r + 1, 7);
        EXPECT(offset[0] == 0 && offset[r + 1] - offset[r] == (int64_t)strlen(expected));
        EXPECT(memcmp(all + offset[r], expected, strlen(expected)) == 0);
      }
      if (all) EXPECT(all[offset[size()]] == '\0');
      free(all);
      free(offset);
    }
}

/* ---- exchange ---- */

enum { MOST_PIECES = 4, GUARD = 16 };

/* Pieces from a to b in a round, the same wherever it is asked. */
static int32_t pieces(uint64_t round, int32_t a, int32_t b) {
  uint64_t stream = core_random_stream(CORE_RANDOM_TEST, round, (uint64_t)(a * 64 + b));
  return (int32_t)core_random_below(1, stream, 0, MOST_PIECES);
}

static int64_t piece_bytes(uint64_t round, int32_t a, int32_t b, int32_t i) {
  uint64_t stream = core_random_stream(CORE_RANDOM_TEST, round, (uint64_t)(a * 64 + b));
  static const uint64_t limits[] = {8, 200, 5000, 100000};
  uint64_t limit = limits[core_random_below(2, stream, (uint64_t)i, 4)];
  return 1 + (int64_t)core_random_below(3, stream, (uint64_t)i, limit);
}

static unsigned char piece_byte(uint64_t round, int32_t a, int32_t b, int32_t i, int64_t k) {
  return (unsigned char)((uint64_t)k * 13 + round * 5 + (uint64_t)(a * 101 + b * 37 + i * 11));
}

/* A list of this rank's pieces; the order of peers differs by rank, that of one peer's pieces is kept. */
static int32_t make_list(uint64_t round, bool sending, comm_piece *list) {
  int32_t count = 0;
  for (int32_t i = 0; i < MOST_PIECES; i++)
    for (int32_t n = 0; n < size(); n++) {
      int32_t peer = (n * (sending ? 1 : size() - 1) + rank() + (int32_t)round) % size();
      if (!sending && size() > 1) peer = (rank() + size() - n) % size();
      int32_t a = sending ? rank() : peer, b = sending ? peer : rank();
      if (i >= pieces(round, a, b)) continue;
      int64_t bytes = piece_bytes(round, a, b, i);
      unsigned char *data = malloc((size_t)bytes + GUARD);
      EXPECT(data != NULL);
      memset(data, 0xee, (size_t)bytes + GUARD);
      for (int64_t k = 0; k < bytes && sending; k++) data[k] = piece_byte(round, a, b, i, k);
      list[count++] = (comm_piece){peer, data, bytes};
    }
  return count;
}

static void check_received(uint64_t round, const comm_piece *list, int32_t count) {
  int32_t seen[64] = {0};
  for (int32_t p = 0; p < count; p++) {
    const unsigned char *data = list[p].data;
    int32_t i = seen[list[p].peer]++;
    for (int64_t k = 0; k < list[p].bytes; k++)
      EXPECT(data[k] == piece_byte(round, list[p].peer, rank(), i, k));
    for (int64_t k = 0; k < GUARD; k++) EXPECT(data[list[p].bytes + k] == 0xee);
  }
}

static void exchange_round(uint64_t round) {
  comm_piece send[MOST_PIECES * 64], recv[MOST_PIECES * 64];
  int32_t sends = make_list(round, true, send), recvs = make_list(round, false, recv);
  EXPECT_OK(comm_exchange(world(), send, sends, recv, recvs));
  check_received(round, recv, recvs);
  for (int32_t i = 0; i < sends; i++) free(send[i].data);
  for (int32_t i = 0; i < recvs; i++) free(recv[i].data);
}

static void ragged_pieces_arrive_whole_and_in_order(void **state) {
  (void)state;
  for (uint64_t round = 0; round < 40; round++) exchange_round(round);
  EXPECT_OK(comm_exchange(world(), NULL, 0, NULL, 0));
}

static void pieces_beyond_the_message_limit_go_in_parts(void **state) {
  (void)state;
  int64_t before = job->largest_message;
  EXPECT(before == (int64_t)1 << 30);
  static const int64_t limits[] = {1000, 4096, 99999};
  for (int i = 0; i < 3; i++) { /* far more messages than requests were planned for */
    job->largest_message = limits[i];
    for (uint64_t round = 100; round < 105; round++) exchange_round(round);
  }
  job->largest_message = before;
}

static void many_pieces_to_one_peer_are_legal(void **state) {
  (void)state;
  enum { MANY = 3000 };
  comm_piece *send = calloc(MANY, sizeof *send), *recv = calloc(MANY, sizeof *recv);
  int32_t *out = calloc(MANY, sizeof *out), *in = calloc(MANY, sizeof *in);
  EXPECT(send && recv && out && in);
  int32_t to = (rank() + 1) % size(), from = (rank() + size() - 1) % size();
  for (int32_t i = 0; i < MANY; i++) {
    out[i] = rank() * MANY + i;
    send[i] = (comm_piece){to, &out[i], sizeof *out};
    recv[i] = (comm_piece){from, &in[i], sizeof *in};
  }
  EXPECT_OK(comm_exchange(world(), send, MANY, recv, MANY));
  for (int32_t i = 0; i < MANY; i++) EXPECT(in[i] == from * MANY + i);
  free(send);
  free(recv);
  free(out);
  free(in);
}

static void bytes_and_seconds_are_counted(void **state) {
  (void)state;
  char data[1000] = {0};
  int64_t before = comm_group_bytes(world());
  double waited = comm_group_seconds(world());
  if (rank() == 0) core_clock_sleep(0.1);
  EXPECT_OK(comm_broadcast(world(), 0, data, sizeof data));
  EXPECT(comm_group_bytes(world()) - before == (rank() == 0 ? 1000 * (size() - 1) : 0));
  double seconds = comm_group_seconds(world()) - waited;
  EXPECT(seconds >= 0 && seconds < 15 && (rank() == 0 || seconds > 0.05));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_world_knows_its_ranks),
      cmocka_unit_test(the_world_splits_by_colour_in_the_order_of_ranks),
      cmocka_unit_test(groups_are_limited_and_can_be_given_back),
      cmocka_unit_test(parts_of_a_world_are_worlds),
      cmocka_unit_test(a_process_can_be_a_world_by_itself),
      cmocka_unit_test(nobody_leaves_a_barrier_before_all_have_come),
      cmocka_unit_test(a_broadcast_reaches_all_from_every_root),
      cmocka_unit_test(reductions_give_the_bits_of_a_sum_in_rank_order),
      cmocka_unit_test(reductions_of_several_pieces_are_the_same),
      cmocka_unit_test(an_all_gather_takes_any_sizes_and_none),
      cmocka_unit_test(records_of_unknown_length_come_to_the_root),
      cmocka_unit_test(ragged_pieces_arrive_whole_and_in_order),
      cmocka_unit_test(pieces_beyond_the_message_limit_go_in_parts),
      cmocka_unit_test(many_pieces_to_one_peer_are_legal),
      cmocka_unit_test(bytes_and_seconds_are_counted),
  };
  return cmocka_run_group_tests_name("comm, operations", tests, comm_expect_start, comm_expect_finish);
}
