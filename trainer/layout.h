/* Layout: which rank holds which experts, and which samples of which modality it works on. A pure function of
 * (settings, world size, rank): every rank can compute every other rank's share.
 *
 *   W ranks = G expert groups of e consecutive ranks. A global batch is cut into micro-batches, a micro-batch
 * into G blocks of consecutive samples, one per expert group. Inside a group, modality m is worked on by
 *   slot_count[m] slots from slot_first[m] on, which share the block's samples evenly, in order.
 *   placement shared: every modality on all e slots. partitioned: as few slots as its cost asks for. */
#ifndef TRAIN_LAYOUT_H
#define TRAIN_LAYOUT_H

#include "comm/comm.h"
#include "core/dims.h"
#include "data/data.h" /* data_range */
#include "trainer/settings.h"

typedef struct train_layout {
  int32_t ranks, rank;   /* W, world rank */
  int32_t expert_ranks;  /* e */
  int32_t group, groups; /* expert group of this rank, G */
  int32_t slot;          /* place in the expert group */
  int32_t modalities;    /* M */
  int64_t batch, micro_batches;
  int64_t block; /* samples of one expert group in one micro-batch */
  bool partitioned;
  int32_t slot_first[CORE_MAX_MODALITIES], slot_count[CORE_MAX_MODALITIES];
} train_layout;

/* Computes the layout. cost: [M] relative work per sample of each modality, used where `ranks` is 0
 * (automatic). */
CORE_NODISCARD core_status train_layout_make(const core_config *config, int32_t ranks, int32_t rank,
                                             const double *cost, train_layout *out);
/* The same for batches of another size and accumulation (evaluation); batch need not divide evenly. */
train_layout train_layout_with_batch(const train_layout *layout, int64_t batch, int64_t micro_batches);
/* Samples of the global batch that `rank` works on for modality m in micro-batch `micro`; lo == hi: none. */
data_range train_layout_range(const train_layout *layout, int32_t rank, int32_t m, int64_t micro);
/* Largest share of one micro-batch that this rank has of modality m. */
int64_t train_layout_most_samples(const train_layout *layout, int32_t rank, int32_t m);
/* Whether `rank` holds modality m's connector and head. */
bool train_layout_holds(const train_layout *layout, int32_t rank, int32_t m);
/* One line: "4 ranks: 2 expert groups of 2; image on slot 0, text on slot 1". */
void train_layout_describe(const train_layout *layout, const train_settings *settings, char *out,
                           int64_t capacity);

#endif
