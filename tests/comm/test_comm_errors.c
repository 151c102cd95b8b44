/* Agreement on errors, and refusals of arguments that leave the group usable. */
#include <stdlib.h>

#include "tests/comm/comm_expect.h"

static comm_group *control(void) {
  return comm_control_group(job);
}

static int32_t rank(void) {
  return comm_rank(control());
}

static int32_t size(void) {
  return comm_size(control());
}

static core_status fail_with(core_status code) {
  FAIL(code, "rank %d cannot do number %d", rank(), (int)code);
}

static core_status pass_on(core_status code) {
  if (code != CORE_OK) TRY(fail_with(code));
  return CORE_OK;
}

/* Every rank holds the same record, byte for byte. */
static void expect_equal_records(void) {
  core_error own, first;
  core_error_save(&own);
  core_error_save(&first);
  EXPECT_OK(comm_broadcast(control(), 0, &first, sizeof first));
  EXPECT(memcmp(&own, &first, sizeof own) == 0);
}

static void all_well_is_agreed(void **state) {
  (void)state;
  for (int i = 0; i < 10; i++) EXPECT_OK(comm_agree(control(), CORE_OK));
  EXPECT_OK(comm_agree_value(control(), "a value", 77));
}

static void one_failure_becomes_everybodys(void **state) {
  (void)state;
  for (int32_t failing = 0; failing < size(); failing++)
    for (int code = 1; code < CORE_STATUS_COUNT; code++) {
      char expected[64];
      core_error_clear();
      core_status local = pass_on(rank() == failing ? (core_status)code : CORE_OK);
      snprintf(expected, sizeof expected, "rank %d cannot do number %d", failing, code);
      EXPECT_ERROR(comm_agree(control(), local), (core_status)code, expected);
      EXPECT(core_error_get()->rank == failing && core_error_get()->depth == 2);
      EXPECT(strcmp(core_error_get()->frame[1].function, "pass_on") == 0);
      expect_equal_records();
    }
}

static void the_highest_code_wins_and_then_the_lowest_rank(void **state) {
  (void)state;
  for (uint32_t pattern = 1; pattern < 1u << (2 * size()); pattern++) {
    static const core_status codes[] = {CORE_OK, CORE_ERR_CONFIG, CORE_ERR_CONFIG, CORE_ERR_TIMEOUT};
    int32_t winner = 0;
    for (int32_t r = 1; r < size(); r++)
      if (codes[pattern >> 2 * r & 3] > codes[pattern >> 2 * winner & 3]) winner = r;
    core_status expected = codes[pattern >> 2 * winner & 3];
    core_error_clear();
    core_status got = comm_agree(control(), pass_on(codes[pattern >> 2 * rank() & 3]));
    EXPECT(got == expected);
    EXPECT(got == CORE_OK || core_error_get()->rank == winner);
  }
}

static void values_that_differ_are_named_with_two_ranks(void **state) {
  (void)state;
  EXPECT_OK(comm_agree_value(control(), "the layout", UINT64_MAX));
  EXPECT_OK(comm_agree_value(control(), "the layout", 0));
  for (int32_t odd = 0; odd < size() && size() > 1; odd++) {
    char expected[128];
    snprintf(expected, sizeof expected, "0000000000000005 on rank %d, 8000000000000009 on rank %d",
             odd == 0 ? 1 : 0, odd);
    EXPECT_ERROR(comm_agree_value(control(), "the list of shards", rank() == odd ? 0x8000000000000009u : 5),
                 CORE_ERR_MISMATCH, "the list of shards differs between ranks");
    EXPECT(strstr(core_error_get()->message, expected) != NULL);
  }
}

static void a_group_agrees_by_itself(void **state) {
  (void)state;
  comm_group *parity = NULL;
  EXPECT_OK(comm_group_create(job, rank() % 2, "parity", &parity));
  int32_t last = comm_world_rank_of(parity, comm_size(parity) - 1);
  core_error_clear();
  core_status local = pass_on(rank() == last && rank() % 2 == 0 ? CORE_ERR_MEMORY : CORE_OK);
  core_status got = comm_agree(parity, local);
  EXPECT(got == (rank() % 2 == 0 ? CORE_ERR_MEMORY : CORE_OK));
  EXPECT(got == CORE_OK || core_error_get()->rank == last); /* the rank in the world */
  comm_group_destroy(parity);
}

static void impossible_arguments_are_refused_everywhere(void **state) {
  (void)state;
  char data[8] = {0}, *all = NULL;
  int64_t *offset = NULL, sum = 1;
  comm_piece good = {rank(), data, 4}, beyond = {size(), data, 4}, below = {-1, data, 4},
             negative = {0, data, -4};
  EXPECT_ERROR(comm_broadcast(control(), size(), data, 8), CORE_ERR_ARGUMENT, "root");
  EXPECT_ERROR(comm_broadcast(control(), -1, data, 8), CORE_ERR_ARGUMENT, "root -1 of a group of");
  EXPECT_ERROR(comm_gather_bytes(control(), size(), data, 8, &all, &offset), CORE_ERR_ARGUMENT, "root");
  EXPECT_ERROR(comm_gather_bytes(control(), 0, data, -8, &all, &offset), CORE_ERR_ARGUMENT, "-8 bytes");
  EXPECT(!all && !offset);
  EXPECT_ERROR(comm_all_reduce(control(), COMM_SUM, CORE_BFLOAT16, data, 4), CORE_ERR_ARGUMENT, "bfloat16");
  EXPECT_ERROR(comm_all_reduce(control(), COMM_SUM, CORE_INT64, data, -1), CORE_ERR_ARGUMENT, "-1 x int64");
  EXPECT_ERROR(comm_exchange(control(), &beyond, 1, &good, 1), CORE_ERR_ARGUMENT, "piece 0 to send");
  EXPECT_ERROR(comm_exchange(control(), &good, 1, &below, 1), CORE_ERR_ARGUMENT, "piece 0 to receive");
  EXPECT_ERROR(comm_exchange(control(), &negative, 1, &good, 1), CORE_ERR_ARGUMENT, "-4 bytes");
  EXPECT_OK(comm_all_reduce(control(), COMM_SUM, CORE_INT64, &sum, 1)); /* the group still works */
  EXPECT(sum == size());
}

static void pieces_to_oneself_must_match(void **state) {
  (void)state;
  char out[8] = {1, 2, 3, 4, 5, 6, 7, 8}, in[8] = {0};
  comm_piece send[2] = {{rank(), out, 4}, {rank(), out + 4, 4}},
             recv[2] = {{rank(), in, 4}, {rank(), in + 4, 4}};
  EXPECT_OK(comm_exchange(control(), send, 2, recv, 2));
  EXPECT(memcmp(in, out, 8) == 0);
  EXPECT_OK(comm_exchange(control(), send, 2, send, 2)); /* in place */
  EXPECT_ERROR(comm_exchange(control(), send, 2, recv, 1), CORE_ERR_INTERNAL, "not expected");
  EXPECT_ERROR(comm_exchange(control(), send, 1, recv, 2), CORE_ERR_INTERNAL, "missing");
  recv[0].bytes = 3;
  EXPECT_ERROR(comm_exchange(control(), send, 2, recv, 2), CORE_ERR_INTERNAL, "4 bytes to oneself");
  EXPECT_OK(comm_barrier(control()));
}

static void options_are_checked(void **state) {
  (void)state;
  char directory[600];
  memset(directory, 'd', sizeof directory - 1);
  directory[sizeof directory - 1] = '\0';
  const comm_options longer = {.deadline = 20, .directory = directory}, usual = {.deadline = 20};
  EXPECT_ERROR(comm_configure(job, &longer), CORE_ERR_ARGUMENT, "599 bytes");
  EXPECT_OK(comm_configure(job, &usual));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(all_well_is_agreed),
      cmocka_unit_test(one_failure_becomes_everybodys),
      cmocka_unit_test(the_highest_code_wins_and_then_the_lowest_rank),
      cmocka_unit_test(values_that_differ_are_named_with_two_ranks),
      cmocka_unit_test(a_group_agrees_by_itself),
      cmocka_unit_test(impossible_arguments_are_refused_everywhere),
      cmocka_unit_test(pieces_to_oneself_must_match),
      cmocka_unit_test(options_are_checked),
  };
  return cmocka_run_group_tests_name("comm, errors", tests, comm_expect_start, comm_expect_finish);
}
