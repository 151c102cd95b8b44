/* What a model costs: parameters and multiply-adds, by what a token passes. A function of the settings and of
 * the data's widths and lengths; nothing is allocated on a device. Comparisons of models state these numbers.
 *
 * FLOPs are of the forward pass, two for each multiply-add of a matrix product; norms, activations, biases
 * and softmaxes are not counted. A backward pass is about twice that. Local. */
#ifndef TRAIN_ARITHMETIC_H
#define TRAIN_ARITHMETIC_H

#include <stdio.h>

#include "core/dims.h"
#include "trainer/settings.h"

/* A way through the model: the tokens of a modality through a tower or a decoder, a decoder's own tokens
 * ("vocabulary", with the product that predicts the next), or one direction of a connector. */
typedef struct train_path {
  char name[2 * CORE_NAME]; /* "image", or "image:text" */
  int64_t parameters;       /* that one of its tokens or its item passes */
  double tokens;            /* mean rows of the trunk of a sample that has the modality; 0: not known */
  double token;             /* FLOPs of a token in products with parameters */
  double attention;         /* FLOPs of a token in attention's scores and mixtures, at the mean length */
  double item;              /* FLOPs of an item once: heads, what a resampler does with each latent */
} train_path;

typedef struct train_arithmetic {
  int64_t parameters; /* distinct; without the connectors of modalities whose width is not known */
  int64_t experts;    /* those of them that are experts' */
  int32_t paths;
  train_path *path; /* [paths] */
} train_arithmetic;

/* width, tokens: [M] of the latents, and the mean latents of a sample that has the modality; 0: not known,
 * then what hangs on it is left out. Checked settings. Free with train_arithmetic_free. ERR_ARGUMENT: a
 * connector, of which nearly everything hangs on the widths, with an unknown one. */
CORE_NODISCARD core_status train_arithmetic_make(const train_settings *settings, const int64_t *width,
                                                 const double *tokens, train_arithmetic *out);
void train_arithmetic_free(train_arithmetic *arithmetic);
/* FLOPs of one whole item: its tokens and its head. */
double train_path_item(const train_path *path);
/* "1.23 M parameters, 4.56 MFLOP a token" of one path, in at most `capacity` bytes. */
void train_path_describe(const train_path *path, char *out, size_t capacity);
/* Lines that each begin with `prefix`; or one JSON object in a line. */
void train_arithmetic_print(const train_arithmetic *arithmetic, const char *prefix, FILE *out);
void train_arithmetic_json(const train_arithmetic *arithmetic, FILE *out);

#endif
