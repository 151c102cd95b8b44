#include <string.h> /* strcmp */

#include "kernels/kernels.h"

#ifdef ANTIPHON_CUDA

static core_status select_cuda(int32_t local_rank, const kern_ops **out) {
  TRY(kern_cuda(local_rank, out));
  return CORE_OK;
}

#else

static core_status select_cuda(int32_t local_rank, const kern_ops **out) {
  (void)local_rank, (void)out;
  FAIL(CORE_ERR_UNSUPPORTED, "device \"cuda\": this program was built without CUDA; use \"cpu\" or \"auto\"");
}

#endif

/* The best there is. A device that cannot be used is passed over; one that fails is an error. */
static core_status select_auto(int32_t local_rank, const kern_ops **out) {
  const core_status status = select_cuda(local_rank, out);
  if (status == CORE_ERR_UNSUPPORTED) {
    core_error_clear();
    *out = kern_cpu();
    return CORE_OK;
  }
  TRY(status);
  return CORE_OK;
}

core_status kern_select(const char *name, int32_t local_rank, const kern_ops **out) {
  CHECK(name != NULL && out != NULL, CORE_ERR_ARGUMENT, "kern_select: name and out must be given");
  *out = NULL;
  CHECK(local_rank >= 0, CORE_ERR_ARGUMENT, "kern_select: local rank %d", (int)local_rank);
  if (strcmp(name, "cpu") == 0) {
    *out = kern_cpu();
  } else if (strcmp(name, "auto") == 0) {
    TRY(select_auto(local_rank, out));
  } else {
    CHECK(strcmp(name, "cuda") == 0, CORE_ERR_UNSUPPORTED,
          "device \"%s\" is unknown: expected \"auto\", \"cpu\" or \"cuda\"", name);
    TRY(select_cuda(local_rank, out));
  }
  return CORE_OK;
}
