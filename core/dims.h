/* The letters that dimensions have everywhere, in code and in comments.
 *
 *   B  samples in a global batch          T  tokens (rows) at hand; packed, never padded
 *   S  segments (one sequence each)       C  width of the trunk ("channels")
 *   H  attention heads, G key/value heads, A width of one head
 *   E  experts of a layer                 K  experts chosen per token
 *   F  hidden width of a feed-forward     Z  width of the common embedding
 *   M  modalities                         D  width of a modality's latents
 *   W  ranks in the world, e ranks of an expert group (expert-parallel size)
 *
 * Packed layout: S sequences of different lengths lie one after another in [T, width] row-major; offset[S+1]
 * (int64, offset[0] = 0, offset[S] = T) says where each begins. An empty sequence is legal everywhere. */
#ifndef CORE_DIMS_H
#define CORE_DIMS_H

enum {
  CORE_MAX_MODALITIES = 16,
  CORE_MAX_CHOICES = 8,    /* K */
  CORE_MAX_EXPERTS = 1024, /* E of one layer */
  CORE_NAME = 96           /* bytes of a tensor's or modality's name, end included */
};

#endif
