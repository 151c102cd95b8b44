#include "kernels/kernels.h"

#include <string.h> /* strcmp */

core_status kern_select(const char *name, const kern_ops **out) {
  CHECK(name != NULL && out != NULL, CORE_ERR_ARGUMENT, "kern_select: name and out must be given");
  *out = NULL;
  CHECK(strcmp(name, "cuda") != 0, CORE_ERR_UNSUPPORTED,
        "device \"cuda\": this program was built without CUDA; use \"cpu\" or \"auto\"");
  CHECK(strcmp(name, "cpu") == 0 || strcmp(name, "auto") == 0, CORE_ERR_UNSUPPORTED,
        "device \"%s\" is unknown: expected \"auto\", \"cpu\" or \"cuda\"", name);
  *out = kern_cpu();
  return CORE_OK;
}
