/* Generation: a decoder continues the prompts of a held-out split, greedily or by sampling. Keys and values
 * of every row are kept, so that a further token costs one row a sample. */
#ifndef TRAIN_GENERATE_H
#define TRAIN_GENERATE_H

#include "trainer/session.h"

typedef struct train_generate_options {
  int64_t tokens;     /* at most, of each sample */
  double temperature; /* 0: the likeliest token, ties by lower number; else softmax(logits / temperature) */
  int32_t stop;       /* ends a sample, and is not given out; -1: none */
} train_generate_options;

/* Takes a sample's tokens; sample ids come in file order. */
typedef core_status (*train_generate_sink)(void *context, uint64_t id, const int32_t *token, int64_t count);

/* Continues every prompt of session->evaluation, noise off, dropless. A sample with neither prompt nor
 * latents gets no token. What is drawn depends on run.seed, the sample's id and the place alone. Allocates
 * keys and values for one batch: layers x batch x (longest prompt + tokens) rows. ERR_STOPPED on request;
 * ERR_ARGUMENT on more than one rank. */
CORE_NODISCARD core_status train_generate_run(train_session *session, const train_generate_options *options,
                                              train_generate_sink sink, void *context);

#endif
