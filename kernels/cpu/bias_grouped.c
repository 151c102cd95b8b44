/* A bias per group of rows: the bias of a linear layer, group by group. */
#include "cpu_impl.h" /* kern_context */

/* Rows of group g. */
static core_tensor group_rows(core_tensor x, const int64_t *row, int64_t g) {
  x.data = (char *)x.data + (size_t)(row[g] * x.shape[1]) * core_dtype_size(x.dtype);
  x.shape[0] = row[g + 1] - row[g];
  return x;
}

static core_tensor group_bias(core_tensor bias, int64_t g) {
  return core_tensor_1((core_real *)bias.data + g * bias.shape[1], bias.dtype, bias.shape[1]);
}

core_status kern_bias_grouped_fwd_cpu(kern_context *context, const int64_t *row, core_tensor bias,
                                      core_tensor x) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  KERN_CHECK_REAL(bias, KERN_ANY, x.shape[1]);
  TRY(kern_check_offset_priv(__func__, "row", row, bias.shape[0], x.shape[0]));
  for (int64_t g = 0; g < bias.shape[0]; g++)
    TRY(kern_bias_fwd_cpu(context, group_bias(bias, g), group_rows(x, row, g)));
  return CORE_OK;
}

core_status kern_bias_grouped_bwd_cpu(kern_context *context, const int64_t *row, core_tensor dy,
                                      core_tensor dbias) {
  KERN_CHECK_ACTIVE(dy, KERN_ANY, KERN_ANY);
  KERN_CHECK_REAL(dbias, KERN_ANY, dy.shape[1]);
  TRY(kern_check_offset_priv(__func__, "row", row, dbias.shape[0], dy.shape[0]));
  for (int64_t g = 0; g < dbias.shape[0]; g++)
    TRY(kern_bias_bwd_cpu(context, group_rows(dy, row, g), group_bias(dbias, g)));
  return CORE_OK;
}
