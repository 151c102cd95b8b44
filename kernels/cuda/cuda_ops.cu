/* The op table of CUDA, and the way to it. */
#include "cuda_impl.h" /* prototypes of the ops */

/* Every slot of the table is named in the lists: a new op that is missing here does not compile. */
#define KERN_CUDA_COUNT(op) +1
static_assert(sizeof(kern_ops) ==
                  sizeof(void *) * (2 KERN_CUDA_MANAGEMENT(KERN_CUDA_COUNT) KERN_CUDA_OPS(KERN_CUDA_COUNT)),
              "an op of the table is missing");

static kern_ops table_of(const core_device *device) {
  kern_ops ops = {};
  ops.name = "cuda";
  ops.device = device;
#define KERN_CUDA_ENTRY(op) ops.op = kern_##op##_cuda;
  KERN_CUDA_MANAGEMENT(KERN_CUDA_ENTRY)
  KERN_CUDA_OPS(KERN_CUDA_ENTRY)
#undef KERN_CUDA_ENTRY
  return ops;
}

extern "C" core_status kern_cuda(int32_t ordinal, const kern_ops **out) {
  CHECK(out != NULL, CORE_ERR_ARGUMENT, "kern_cuda: out must be given");
  *out = NULL;
  TRY(kern_cuda_open_priv(ordinal));
  static const kern_ops ops = table_of(kern_cuda_device_priv());
  *out = &ops;
  return CORE_OK;
}
