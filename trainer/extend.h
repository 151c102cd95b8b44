/* Extension (METHODS section 4; Zhong et al. 2024, MoExtend): some layers of a trained mixture get one more
 * expert each, in which the next run learns a new modality, while every old tensor keeps its bits.
 *
 *   d_j = std over the experts i of E_j (before_ij - after_ij)
 *
 * of MoE layer j, where before and after are the shares of the choices that expert i gets on held-out data
 * before and after its routers alone were trained on the new task (population deviation). The layers that
 * would move most are extended.
 *
 *   blocks.L.experts.E.*       the layer's most chosen expert, by the shares before (ties: the lower index)
 *   blocks.L.router.added.*    its column, or another, by `init`; a bias where there is one
 *   all else                   the original's, byte for byte
 *
 * Every rank makes whole tensors of its own, about 1/W of the bytes, which it holds three times: what they
 * are made of, what is made, and the writer's copy.
 *
 * There is no optimizer state in what is made, and no calibration: the run that begins with it has both. */
#ifndef TRAIN_EXTEND_H
#define TRAIN_EXTEND_H

#include "trainer/measure.h"
#include "trainer/settings.h"

typedef struct train_extension {
  comm_world *comm;
  const core_config *run; /* as train_measure_options; and run.seed, for layers chosen at random */
  const char *original;   /* path of a checkpoint, without adapters and without added experts */
  const char *tuned;      /* of the same model with other routers; NULL: layers are not chosen by d */
  const train_extend_settings *how;
  const char *directory; /* receives step-00000000, which must not be there yet */
  const char *report;    /* path of extend.json */
} train_extension;

/* Everything is checked before anything is written; the checkpoint appears whole or not at all, after the
 * report: for each layer d_j, whether it was chosen and why, and for each old tensor a hash of its bytes.
 * Prints the table on rank 0. Errors: those of reading and measuring; ERR_MISMATCH for two models that differ
 * in more than their routers; ERR_ARGUMENT for a model without mixtures, with adapters, with added experts,
 * for a choice of no layer; ERR_MEMORY when the extended model has no room; ERR_STOPPED. Collective over the
 * world. */
CORE_NODISCARD core_status train_extend(const train_extension *extension);

/* ---- the choice: extend_choose.c. Local ---- */

typedef struct train_extension_layer {
  int64_t experts, block;
  double d;
  int32_t place; /* by d, from 1; ties to the lower layer; 0: d is not known */
  bool chosen;
  int64_t source; /* most chosen expert */
  double share;   /* of the choices, before */
} train_extension_layer;

typedef struct train_extension_choice {
  int32_t layers, wanted;       /* wanted: how many the rule takes */
  train_extension_layer *layer; /* [layers] */
} train_extension_choice;

/* std over i of E (before_i - after_i), shares of counts [E]; 0 where nothing was counted. */
double train_extension_deviation(int64_t experts, const int64_t *before, const int64_t *after);
/* Whether a rule is one: d, lowest, random (of floor(share L) layers), or as model.moe.layers says of the
 * L MoE layers: all, every 2, first half, second half, "0,3". */
bool train_extension_rule_valid(const char *rule, int64_t layers);
/* Whether it asks for d. */
bool train_extension_rule_measures(const char *rule);
/* after NULL: not known. classes: of tokens that are counted, count of them; 0: all. Free choice->layer, also
 * after an error. ERR_ARGUMENT: no layer, a rule or a class that is none. */
CORE_NODISCARD core_status train_extension_choose(const train_extend_settings *how, uint64_t seed,
                                                  const train_measurement *before,
                                                  const train_measurement *after,
                                                  train_extension_choice *choice);
/* Why a layer was chosen or not, in at most `capacity` bytes. */
void train_extension_why(const train_extend_settings *how, const train_extension_choice *choice, int32_t j,
                         char *out, size_t capacity);

#endif
