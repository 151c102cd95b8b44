/* Health figures of the mixtures (METHODS section 1), from the sums of a step or of an evaluation: how each
 * layer treats each modality. Local. */
#ifndef TRAIN_HEALTH_H
#define TRAIN_HEALTH_H

#include <stdio.h>

#include "trainer/model/moe.h"

/* Of one layer and modality. Entropies in natural logarithms, of noise-free probabilities. */
typedef struct train_health {
  int64_t tokens;
  double success, dropped;       /* share of the tokens with a kept choice; without one */
  double kept_choices;           /* share of the choices */
  double entropy;                /* local: mean H(p) */
  double entropy_of_mean;        /* global: H(mean p) */
  double effective_experts;      /* exp of it */
  double entropy_of_choices;     /* H of the histogram of choices before drops */
  double gate[CORE_MAX_CHOICES]; /* mean weight of the k-th choice, noisy in training */
} train_health;

/* Of one layer, all modalities together. */
typedef struct train_layer_health {
  double max_over_mean;    /* busiest expert's load over the mean, after drops */
  int64_t dead;            /* experts without a token, after drops */
  double importance, load; /* CV^2 of the sums of p and of the load estimate, whatever their weights; load 0
                              without noise */
} train_layer_health;

train_health train_health_of(const train_moe_sums *sums, int32_t layer, int32_t m);
train_layer_health train_health_of_layer(const train_moe_sums *sums, int32_t layer);
/* Of the tokens of class c (-1: all), the share that chose an added expert: the mean over the layers that
 * have some; 0 where none has. What an extended model forgets hangs on it (METHODS section 4). */
double train_health_new(const train_moe_sums *sums, const train_settings *settings, int32_t c);
/* A line "tokens at new experts: ..." for all and each class; nothing for a model without added experts. */
void train_health_print_new(const train_moe_sums *sums, const train_settings *settings, FILE *out);
/* A table, a row for each layer and modality; nothing for a model without mixtures. */
void train_health_print(const train_moe_sums *sums, const train_settings *settings, FILE *out);

#endif
