/* Search: the k vectors of a gallery that are nearest to each query by inner product, exactly.
 *
 * A score is the float64 sum over coordinates, in one fixed order, of products of the float32 (or widened
 * float16) values. Equal scores go by the lower id. So a result is a function of query and gallery alone,
 * whatever the blocks, batches and threads: products in float32 (blocked GEMM) only say which vectors cannot
 * be among the best, by a bound on their rounding error (Higham 2002, eq. 3.5: |error| <= n u / (1 - n u)
 * |q||x|); the others are scored as above. Where very many vectors are as good as the k-th best (a gallery of
 * equal vectors), all of them are, and search is slower.
 *
 * Vectors have at most unit length (embeddings are normalised); longer ones are refused. */
#ifndef TRAIN_SEARCH_H
#define TRAIN_SEARCH_H

#include "core/tensor.h"
#include "trainer/serve/vectors.h"

typedef struct train_hit {
  double score;
  uint64_t id;
  int64_t row; /* of the gallery */
} train_hit;

/* Where the vectors of a gallery come from. */
typedef struct train_gallery {
  const train_vectors *file; /* read and checked block by block; NULL: `memory` */
  const void *memory;        /* [rows, width] of dtype, of at most unit length, borrowed */
  core_dtype dtype;          /* FLOAT16 or FLOAT32 */
  int64_t rows, width;
  const uint64_t *id; /* [rows] distinct, borrowed */
} train_gallery;

/* A gallery in a file. ERR_FORMAT when it holds queries, or no vectors. */
CORE_NODISCARD core_status train_gallery_of_file(const train_vectors *file, train_gallery *out);

/* The same with all vectors in memory, each checked, by `threads` (0: all that OpenMP offers). Errors also
 * those of reading, and ERR_MEMORY. Free with train_gallery_unload. */
CORE_NODISCARD core_status train_gallery_load(const train_vectors *file, int32_t threads, train_gallery *out);
void train_gallery_unload(train_gallery *gallery);

typedef struct train_search train_search;

typedef struct train_search_options {
  int32_t threads; /* 0: all that OpenMP offers */
  int64_t k;       /* 1 to the gallery's rows */
  int64_t batch;   /* queries of one matrix product; 0: 64 */
} train_search_options;

/* Plans memory: independent of the gallery's size. ERR_ARGUMENT with the numbers when k or batch cannot be.
 * The gallery stays borrowed. Local. */
CORE_NODISCARD core_status train_search_create(const train_gallery *gallery,
                                               const train_search_options *options, train_search **out);
void train_search_destroy(train_search *search);
/* Queries that one reading of a gallery in a file serves. */
int64_t train_search_group(const train_search *search);
int32_t train_search_threads(const train_search *search);
/* query: float [count, width]; match: [count, k], best first. ERR_NON_FINITE and ERR_ARGUMENT (too long) name
 * the query; ERR_CORRUPT, ERR_IO come from the file; ERR_STOPPED when a stop was requested. Deterministic.
 * Local, with threads of its own. */
CORE_NODISCARD core_status train_search_run(train_search *search, const float *query, int64_t count,
                                            train_hit *match);

#endif
