/* What tests may ask of the emulated CUDA stack beyond CUDA itself: reports and injected faults. The product
 * never includes this.
 *
 * A report is what the emulation found wrong with a program (a diverged barrier, an overwritten guard, an
 * operation that ranks disagree on). Each is printed to standard error when it arises; a report that a GPU
 * would answer with a broken context also makes every later call fail with cudaErrorLaunchFailure. */
#ifndef CUDA_DOUBLE_H
#define CUDA_DOUBLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Reports so far, one a line; "" when there is none. Valid until the next report. */
const char *cuda_double_reports(void);
/* Forgets reports, the broken context, and everything injected below. Allocations and streams stay. */
void cuda_double_forget(void);

/* How work of different streams is ordered, as far as events allow. */
enum cuda_double_order {
  CUDA_DOUBLE_RANDOM, /* one of the next two, or steps of all streams in turn, drawn for each wait */
  CUDA_DOUBLE_LAZY,   /* only what the wait needs */
  CUDA_DOUBLE_EAGER   /* everything else first, the newest stream before older ones */
};
void cuda_double_set_order(enum cuda_double_order order);
/* Guards around allocations that are still alive; reports those that were overwritten. */
void cuda_double_check_guards(void);
/* Work that is queued and not done, over all streams. */
int64_t cuda_double_pending(void);
/* Allocations of device and of page-locked memory that are alive. */
int64_t cuda_double_allocations(void);

/* The n-th allocation from now on (1: the next) fails, device and page-locked memory alike; 0: none. */
void cuda_double_fail_allocation(int64_t n);
/* From the n-th NCCL operation of this process on (1: the next): the communicator has an asynchronous
 * error; or this rank never arrives. 0: none. */
void cuda_double_fail_nccl(int64_t n);
void cuda_double_leave_nccl(int64_t n);
/* ncclCommAbort never returns. */
void cuda_double_hang_abort(bool hang);

#ifdef __cplusplus
}
#endif

#endif
