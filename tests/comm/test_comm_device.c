/* Operations on memory of a device, one expectation for every transport: the CPU's memory, and where CUDA is
 * built in, staging and NCCL. What a rank brings is a function of (rank, index), so each rank computes what
 * must come out. */
#include <stdlib.h>

#include "core/random.h"
#include "kernels/kernels.h"
#include "tests/comm/comm_expect.h"
#ifdef ANTIPHON_CUDA_EMULATED
#include "tests/cuda_double/cuda_double.h" /* failing allocations */
#endif

enum { GUARD = 64, STAGING = 4096 }; /* little staging memory, so that everything goes in parts */

typedef struct transport {
  const char *name; /* as comm_device_transport_name has it */
  comm_device_transport asked;
  const core_device *device;
} transport;

static transport transports[4];
static int transport_count;

/* Of the transport under test. */
static comm_group *group;
static const core_device *device;

static int32_t rank(void) {
  return comm_rank(comm_world_group(job));
}

static int32_t size(void) {
  return comm_size(comm_world_group(job));
}

static void *put(const void *host, int64_t bytes) {
  void *there = NULL;
  EXPECT_OK(device->allocate((size_t)bytes + GUARD, &there));
  EXPECT_OK(device->fill(there, 0xee, (size_t)bytes + GUARD, NULL));
  if (bytes > 0) EXPECT_OK(device->copy(there, host, (size_t)bytes, NULL));
  return there;
}

/* Copies to `host`, checks what lies behind, releases. */
static void take(void *there, void *host, int64_t bytes) {
  unsigned char guard[GUARD];
  EXPECT_OK(device->copy(host, there, (size_t)bytes, NULL));
  EXPECT_OK(device->copy(guard, (char *)there + bytes, GUARD, NULL));
  for (int i = 0; i < GUARD; i++) EXPECT(guard[i] == 0xee);
  device->release(there);
}

/* Runs the check on a fresh group of each transport. */
static void on_each(void (*check)(void)) {
  for (int t = 0; t < transport_count; t++) {
    device = transports[t].device;
    EXPECT_OK(comm_group_create(job, 0, transports[t].name, &group));
    EXPECT_OK(comm_group_device(group, device, transports[t].asked, STAGING));
    EXPECT(strcmp(comm_device_transport_name(group), transports[t].name) == 0);
    check();
    EXPECT_OK(device->stream_wait(NULL));
    comm_group_destroy(group);
  }
}

/* ---- exchange ---- */

static uint64_t draw(uint64_t round, int32_t a, int32_t b, uint64_t what, uint64_t below) {
  return core_random_below(1, core_random_stream(CORE_RANDOM_TEST, round, (uint64_t)(a * 64 + b)), what,
                           below);
}

/* 0 to 3 pieces from a to b, each of 1 to 5000 bytes. */
static int32_t pieces(uint64_t round, int32_t a, int32_t b) {
  return (int32_t)draw(round, a, b, 0, 4);
}

static int64_t piece_bytes(uint64_t round, int32_t a, int32_t b, int32_t i) {
  return 1 + (int64_t)draw(round, a, b, 1 + (uint64_t)i, i == 1 ? 5000 : 300);
}

static unsigned char piece_byte(uint64_t round, int32_t a, int32_t b, int32_t i, int64_t k) {
  return (unsigned char)((uint64_t)k * 13 + round * 5 + (uint64_t)(a * 101 + b * 37 + i * 11));
}

static int32_t make_list(uint64_t round, bool sending, comm_piece *list) {
  unsigned char host[5001];
  int32_t count = 0;
  for (int32_t n = 0; n < size(); n++) {
    int32_t peer = (rank() + n) % size(), a = sending ? rank() : peer, b = sending ? peer : rank();
    for (int32_t i = 0; i < pieces(round, a, b); i++) {
      int64_t bytes = piece_bytes(round, a, b, i);
      for (int64_t k = 0; k < bytes; k++) host[k] = sending ? piece_byte(round, a, b, i, k) : 0;
      list[count++] = (comm_piece){peer, put(host, bytes), bytes};
    }
  }
  return count;
}

static void check_exchange(void) {
  comm_piece send[3 * 64], recv[3 * 64];
  unsigned char host[5001];
  for (uint64_t round = 0; round < 6; round++) {
    int32_t sends = make_list(round, true, send), recvs = make_list(round, false, recv), at = 0;
    EXPECT_OK(comm_device_exchange(group, send, sends, recv, recvs, NULL));
    for (int32_t n = 0; n < size(); n++) {
      int32_t from = (rank() + n) % size();
      for (int32_t i = 0; i < pieces(round, from, rank()); i++, at++) {
        take(recv[at].data, host, recv[at].bytes);
        for (int64_t k = 0; k < recv[at].bytes; k++) EXPECT(host[k] == piece_byte(round, from, rank(), i, k));
      }
    }
    for (int32_t i = 0; i < sends; i++) take(send[i].data, host, send[i].bytes);
  }
  EXPECT_OK(comm_device_exchange(group, NULL, 0, NULL, 0, NULL));
}

static void ragged_pieces_arrive_whole_and_in_order(void **state) {
  (void)state;
  on_each(check_exchange);
}

/* Equal pieces, of a byte, of more than the staging memory holds, and of nothing. */
static void check_all_to_all(void) {
  static const int64_t lengths[] = {1, 700, 5000, 0};
  for (int n = 0; n < 4; n++) {
    const int64_t bytes = lengths[n], all = bytes * size();
    unsigned char *host = malloc((size_t)all + 1), *zeros = calloc((size_t)all + 1, 1);
    EXPECT(host && zeros);
    for (int64_t k = 0; k < all; k++) host[k] = piece_byte(3, rank(), (int32_t)(k / bytes), n, k % bytes);
    void *send = put(host, all), *recv = put(zeros, all);
    EXPECT_OK(comm_device_all_to_all(group, send, recv, bytes, NULL));
    take(recv, host, all);
    for (int64_t k = 0; k < all; k++)
      EXPECT(host[k] == piece_byte(3, (int32_t)(k / bytes), rank(), n, k % bytes));
    take(send, host, all);
    free(host);
    free(zeros);
  }
}

static void equal_pieces_change_places(void **state) {
  (void)state;
  on_each(check_all_to_all);
}

/* ---- reductions ---- */

static double value_of(int32_t r, int64_t i) {
  return (double)((int64_t)(core_random_u64(7 + (uint64_t)r, 3, (uint64_t)i) % 2001) - 1000) / 64;
}

static void set(core_dtype dtype, void *data, int64_t i, double value) {
  if (dtype == CORE_FLOAT32) ((float *)data)[i] = (float)value;
  if (dtype == CORE_FLOAT64) ((double *)data)[i] = value;
  if (dtype == CORE_INT32) ((int32_t *)data)[i] = (int32_t)value;
  if (dtype == CORE_INT64) ((int64_t *)data)[i] = (int64_t)value;
  if (dtype == CORE_UINT64) ((uint64_t *)data)[i] = (uint64_t)(value + 2000);
}

static void fill_values(core_dtype dtype, void *data, int64_t count, int32_t r) {
  for (int64_t i = 0; i < count; i++) set(dtype, data, i, value_of(r, i));
}

/* Sums are exact here (multiples of 1/64), so the operation on host memory says what every transport must. */
static void check_one_reduce(comm_reduction operation, core_dtype dtype, int64_t count) {
  int64_t bytes = count * (int64_t)core_dtype_size(dtype);
  void *expected = malloc((size_t)bytes + 1), *got = malloc((size_t)bytes + 1);
  EXPECT(expected && got);
  fill_values(dtype, expected, count, rank());
  void *there = put(expected, bytes);
  EXPECT_OK(comm_all_reduce(comm_world_group(job), operation, dtype, expected, count));
  EXPECT_OK(comm_device_all_reduce(group, operation, dtype, there, count, NULL));
  take(there, got, bytes);
  EXPECT(memcmp(expected, got, (size_t)bytes) == 0);
  free(expected);
  free(got);
}

static void check_reduce(void) {
  static const core_dtype dtypes[] = {CORE_FLOAT32, CORE_FLOAT64, CORE_INT32, CORE_INT64, CORE_UINT64};
  static const int64_t counts[] = {0, 1, 7, 1000, 3001};
  for (int d = 0; d < 5; d++)
    for (int operation = COMM_SUM; operation <= COMM_MIN; operation++)
      for (int c = 0; c < 5; c++) check_one_reduce((comm_reduction)operation, dtypes[d], counts[c]);
}

static void reductions_are_those_of_host_memory(void **state) {
  (void)state;
  on_each(check_reduce);
}

/* How many elements each rank's range has: equal, unequal, with empty ones, one alone. */
static int64_t range_of(int pattern, int32_t r) {
  if (pattern == 0) return 600;
  if (pattern == 1) return 1 + 701 * r;
  if (pattern == 2) return r % 2 == 0 ? 0 : 1500;
  return r == size() - 1 ? 77 : 0;
}

static void check_one_scatter(core_dtype dtype, int pattern) {
  int64_t count[64], total = 0, first = 0, width = (int64_t)core_dtype_size(dtype);
  for (int32_t r = 0; r < size(); r++) {
    count[r] = range_of(pattern, r);
    if (r < rank()) first += count[r];
    total += count[r];
  }
  char *expected = malloc((size_t)(total * width) + 1), *got = malloc((size_t)(total * width) + 1);
  EXPECT(expected && got);
  fill_values(dtype, expected, total, rank());
  void *there = put(expected, total * width);
  EXPECT_OK(comm_all_reduce(comm_world_group(job), COMM_SUM, dtype, expected, total));
  EXPECT_OK(comm_device_reduce_scatter(group, dtype, there, count, NULL));
  take(there, got, total * width);
  EXPECT(memcmp(expected + first * width, got + first * width, (size_t)(count[rank()] * width)) == 0);
  free(expected);
  free(got);
}

static void check_scatter(void) {
  for (int pattern = 0; pattern < 4; pattern++) {
    check_one_scatter(CORE_FLOAT32, pattern);
    check_one_scatter(CORE_FLOAT64, pattern);
  }
}

static void a_reduce_scatter_leaves_every_rank_its_range_of_the_sum(void **state) {
  (void)state;
  on_each(check_scatter);
}

/* Where the order of a sum shows in its bits: the CPU's memory and staging promise the order of ranks. */
static void check_bits(void) {
  enum { COUNT = 2500 };
  float own[COUNT], expected[COUNT] = {0}, got[COUNT];
  int64_t count[64] = {0};
  if (strcmp(comm_device_transport_name(group), "nccl") == 0) return;
  for (int32_t r = 0; r < size(); r++)
    for (int64_t i = 0; i < COUNT; i++) {
      float value = (float)core_random_normal(11 + (uint64_t)r, 5, (uint64_t)i);
      if (r == rank()) own[i] = value;
      expected[i] = r == 0 ? value : expected[i] + value;
    }
  void *there = put(own, sizeof own);
  EXPECT_OK(comm_device_all_reduce(group, COMM_SUM, CORE_FLOAT32, there, COUNT, NULL));
  take(there, got, sizeof got);
  EXPECT(memcmp(expected, got, sizeof got) == 0);
  count[size() - 1] = COUNT;
  there = put(own, sizeof own);
  EXPECT_OK(comm_device_reduce_scatter(group, CORE_FLOAT32, there, count, NULL));
  take(there, got, sizeof got);
  EXPECT(rank() != size() - 1 || memcmp(expected, got, sizeof got) == 0);
}

static void sums_have_the_bits_of_the_order_of_ranks(void **state) {
  (void)state;
  on_each(check_bits);
}

/* ---- all-gather ---- */

static void check_gather(void) {
  for (int pattern = 0; pattern < 4; pattern++) {
    int64_t bytes[64], total = 0, at = 0;
    for (int32_t r = 0; r < size(); r++) total += bytes[r] = range_of(pattern, r);
    unsigned char *host = malloc((size_t)total + 1);
    EXPECT(host != NULL);
    memset(host, 0, (size_t)total);
    for (int32_t r = 0; r < size(); at += bytes[r++])
      for (int64_t k = 0; k < bytes[r] && r == rank(); k++) host[at + k] = piece_byte(9, r, 0, pattern, k);
    void *there = put(host, total);
    EXPECT_OK(comm_device_all_gather(group, there, bytes, NULL));
    take(there, host, total);
    at = 0;
    for (int32_t r = 0; r < size(); at += bytes[r++])
      for (int64_t k = 0; k < bytes[r]; k++) EXPECT(host[at + k] == piece_byte(9, r, 0, pattern, k));
    free(host);
  }
}

static void an_all_gather_hands_every_range_to_all(void **state) {
  (void)state;
  on_each(check_gather);
}

/* ---- order ---- */

/* Many operations are issued before anything is waited for; each uses what the one before left, on the main
 * stream and on another one, also more of them than the watch keeps in its list. */
static void check_order(void) {
  enum { TIMES = 300 };
  int64_t sum = 0, expected = -1, *there = put(&sum, sizeof sum);
  core_stream *other = NULL;
  core_event *done = NULL;
  EXPECT_OK(device->stream_create(&other));
  EXPECT_OK(device->event_create(&done));
  EXPECT_OK(device->fill(there, 0xff, sizeof *there, NULL)); /* -1, and then it is not waited for */
  for (int i = 0; i < TIMES; i++) {
    core_stream *stream = i % 3 == 2 ? other : NULL;
    if (stream) { /* the other stream continues where the main one is, and the main one after it */
      EXPECT_OK(device->event_record(done, NULL));
      EXPECT_OK(device->event_before(other, done));
    }
    EXPECT_OK(comm_device_all_reduce(group, i % 7 == 0 && i < 70 ? COMM_SUM : COMM_MAX, CORE_INT64, there, 1,
                                     stream));
    if (stream) {
      EXPECT_OK(device->event_record(done, other));
      EXPECT_OK(device->event_before(NULL, done));
    }
    if (i % 7 == 0 && i < 70) expected *= size();
  }
  int64_t got = 0;
  take(there, &got, sizeof got);
  EXPECT(got == expected);
  device->event_destroy(done);
  device->stream_destroy(other);
}

static void operations_keep_the_order_of_streams(void **state) {
  (void)state;
  on_each(check_order);
}

/* ---- refusals ---- */

#ifdef ANTIPHON_CUDA_EMULATED
/* Memory that one rank cannot have is an error on all, and a group that failed so can be tried again. */
static void memory_that_one_rank_lacks_is_an_error_of_all(void **state) {
  (void)state;
  for (int t = 1; t < transport_count; t++) {
    core_status status = CORE_ERR_MEMORY;
    int failures = 0;
    for (int n = 1; status != CORE_OK; n++) {
      comm_group *fresh = NULL;
      EXPECT_OK(comm_group_create(job, 0, "short", &fresh));
      if (rank() == size() - 1) cuda_double_fail_allocation(n);
      status = comm_group_device(fresh, transports[t].device, transports[t].asked, STAGING);
      cuda_double_fail_allocation(0);
      EXPECT(status == CORE_OK || status == CORE_ERR_MEMORY);
      int64_t same = status;
      EXPECT_OK(comm_all_reduce(comm_world_group(job), COMM_MAX, CORE_INT64, &same, 1));
      EXPECT(same == (int64_t)status);
      failures += status != CORE_OK;
      comm_group_destroy(fresh);
    }
    EXPECT(failures == (transports[t].asked == COMM_DEVICE_STAGED && size() > 1 ? 2 : 0));
  }
}
#endif

static void check_refusals(void) {
  float x[4] = {0};
  int64_t none[64] = {0}, count[64] = {0};
  comm_piece beyond = {size(), x, 4}, negative = {0, x, -4};
  count[0] = -1;
  EXPECT_ERROR(comm_device_all_reduce(group, COMM_SUM, CORE_BFLOAT16, x, 4, NULL), CORE_ERR_ARGUMENT,
               "bfloat16");
  EXPECT_ERROR(comm_device_all_reduce(group, COMM_SUM, CORE_FLOAT32, x, -1, NULL), CORE_ERR_ARGUMENT, "-1 x");
  EXPECT_ERROR(comm_device_reduce_scatter(group, CORE_INT32, x, none, NULL), CORE_ERR_ARGUMENT,
               "reduce-scatter of int32");
  EXPECT_ERROR(comm_device_reduce_scatter(group, CORE_FLOAT32, x, count, NULL), CORE_ERR_ARGUMENT,
               "-1 for rank 0");
  EXPECT_ERROR(comm_device_all_gather(group, x, count, NULL), CORE_ERR_ARGUMENT, "-1 for rank 0");
  EXPECT_ERROR(comm_device_exchange(group, &beyond, 1, NULL, 0, NULL), CORE_ERR_ARGUMENT, "piece 0 to send");
  EXPECT_ERROR(comm_device_exchange(group, NULL, 0, &negative, 1, NULL), CORE_ERR_ARGUMENT, "-4 bytes");
  EXPECT_ERROR(comm_device_all_to_all(group, x, x + 2, -8, NULL), CORE_ERR_ARGUMENT,
               "all-to-all of -8 bytes");
  EXPECT_OK(comm_device_all_gather(group, NULL, none, NULL)); /* nothing, and the group still works */
  check_one_reduce(COMM_SUM, CORE_INT64, 5);
}

static void impossible_arguments_are_refused_everywhere(void **state) {
  (void)state;
  on_each(check_refusals);
}

static void a_group_serves_the_device_it_was_told_of(void **state) {
  (void)state;
  float x = 0;
  int64_t none[64] = {0};
  comm_group *fresh = NULL;
  EXPECT_OK(comm_group_create(job, 0, "fresh", &fresh));
  EXPECT_ERROR(comm_device_all_reduce(fresh, COMM_SUM, CORE_FLOAT32, &x, 1, NULL), CORE_ERR_ARGUMENT,
               "group 'fresh' was not told of a device");
  EXPECT_ERROR(comm_device_all_gather(fresh, &x, none, NULL), CORE_ERR_ARGUMENT, "was not told");
  EXPECT_ERROR(comm_group_device(fresh, kern_cpu()->device, COMM_DEVICE_NCCL, STAGING), CORE_ERR_UNSUPPORTED,
               "group 'fresh' cannot use NCCL: it moves memory of CUDA devices, not of");
  EXPECT_OK(comm_group_device(fresh, kern_cpu()->device, COMM_DEVICE_AUTO, STAGING));
  EXPECT_OK(comm_group_device(fresh, kern_cpu()->device, COMM_DEVICE_AUTO, STAGING)); /* again: nothing new */
  EXPECT_OK(comm_device_all_reduce(fresh, COMM_SUM, CORE_FLOAT32, &x, 1, NULL));
  comm_group_destroy(fresh);
}

#ifdef ANTIPHON_CUDA
static bool own_devices; /* every rank has a device of its own */

/* Ranks that share a device are named where NCCL is asked for; left to itself a group is staged then. */
static void nccl_is_chosen_where_every_rank_has_its_device(void **state) {
  (void)state;
  comm_group *fresh = NULL;
  if (transport_count == 1) return;
  const core_device *cuda = transports[1].device;
  EXPECT_OK(comm_group_create(job, 0, "chosen", &fresh));
  if (!own_devices) {
    EXPECT_ERROR(comm_group_device(fresh, cuda, COMM_DEVICE_NCCL, STAGING), CORE_ERR_UNSUPPORTED,
                 "group 'chosen' cannot use NCCL: ranks 0 and 1 share the device");
    EXPECT_ERROR(comm_device_all_gather(fresh, NULL, NULL, NULL), CORE_ERR_ARGUMENT, "was not told");
  }
  EXPECT_OK(comm_group_device(fresh, cuda, COMM_DEVICE_AUTO, STAGING));
  const char *expected = size() == 1 ? "self" : own_devices ? "nccl" : "staged";
  EXPECT(strcmp(comm_device_transport_name(fresh), expected) == 0);
  group = fresh;
  device = cuda;
  check_one_reduce(COMM_SUM, CORE_FLOAT32, 100);
  comm_group_destroy(fresh);
}

static void add_cuda(void) {
  const kern_ops *ops = NULL;
  int64_t share[2];
  if (kern_cuda(comm_local_rank(job), &ops) != CORE_OK) {
    print_message("only memory of the CPU: %s\n", core_error_get()->message);
    return;
  }
  /* the device's number is in its name: "cuda:0 ..." */
  share[0] = share[1] = atoi(ops->device->name + 5) == comm_local_rank(job);
  EXPECT_OK(comm_all_reduce(comm_world_group(job), COMM_MIN, CORE_INT64, share, 1));
  own_devices = share[0];
  transports[transport_count++] = (transport){"staged", COMM_DEVICE_STAGED, ops->device};
  if (own_devices) transports[transport_count++] = (transport){"nccl", COMM_DEVICE_NCCL, ops->device};
}
#endif

static int start(void **state) {
  if (comm_expect_start(state) != 0) return -1;
  transports[transport_count++] = (transport){"host", COMM_DEVICE_AUTO, kern_cpu()->device};
#ifdef ANTIPHON_CUDA
  add_cuda();
#endif
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(ragged_pieces_arrive_whole_and_in_order),
      cmocka_unit_test(equal_pieces_change_places),
      cmocka_unit_test(reductions_are_those_of_host_memory),
      cmocka_unit_test(a_reduce_scatter_leaves_every_rank_its_range_of_the_sum),
      cmocka_unit_test(sums_have_the_bits_of_the_order_of_ranks),
      cmocka_unit_test(an_all_gather_hands_every_range_to_all),
      cmocka_unit_test(operations_keep_the_order_of_streams),
      cmocka_unit_test(impossible_arguments_are_refused_everywhere),
      cmocka_unit_test(a_group_serves_the_device_it_was_told_of),
#ifdef ANTIPHON_CUDA_EMULATED
      cmocka_unit_test(memory_that_one_rank_lacks_is_an_error_of_all),
#endif
#ifdef ANTIPHON_CUDA
      cmocka_unit_test(nccl_is_chosen_where_every_rank_has_its_device),
#endif
  };
  return cmocka_run_group_tests_name("comm, memory of a device", tests, start, comm_expect_finish);
}
