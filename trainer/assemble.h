/* Assembly (METHODS section 3; Li et al. 2024): a decoder with mixtures from dense ones that were trained
 * from a common base.
 *
 *   blocks.L.experts.J.{in,out}.*   blocks.L.feed_forward.{in,out}.* of the source of slot J of layer L
 *   blocks.L.router.*               fresh: N(0, 0.02), keyed by name and run.seed as in any new model
 *   connector.M.*, latent_*\/M       of the source of modality M, else of the base
 *   all else                        of the base; attention, norms, embedding and head must be the same bits
 * in every source, the feed-forwards of layers without a mixture need not
 *
 * Adapters (trainer/model/lora.h) of a source are merged into its matrices on the way. Every rank reads,
 * compares and writes whole tensors of its own, about 1/W of the bytes, which it holds twice (the second is
 * the writer's copy); sources are compared one tensor at a time. A source with adapters is held whole on
 * every rank while it is worked on, one at a time. */
#ifndef TRAIN_ASSEMBLE_H
#define TRAIN_ASSEMBLE_H

#include "checkpoint/checkpoint.h"
#include "core/config.h"

typedef struct train_assembly {
  const core_config *config; /* of the decoder with mixtures */
  comm_group *control;
  const char *base; /* path of a checkpoint */
  const char *const
      *slot; /* [slots] of paths: the experts of the first layer with a mixture, then the next */
  const int32_t
      *layer_slots; /* [layers] how many of them each layer has, 0: no mixture; NULL: `slot` is for each */
  int32_t slots, layers;
  const char *const *connector; /* [modalities of the configuration] of paths; NULL: the base's */
  const char *directory;        /* receives step-00000000, which must not be there yet */
} train_assembly;

/* Everything is checked before anything is written; the checkpoint appears whole or not at all. Errors: those
 * of reading; ERR_MISMATCH for a source of another shape or configuration, for a tensor that is missing or
 * differs from the base's, for slots of another number than experts; ERR_STOPPED. Collective over `control`.
 */
CORE_NODISCARD core_status train_assemble(const train_assembly *assembly);

#endif
