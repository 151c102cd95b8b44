/* metrics.jsonl: one JSON object a line, one line a step, and one an evaluation. Written by rank 0. */
#ifndef TRAIN_METRICS_H
#define TRAIN_METRICS_H

#include "data/data.h"
#include "trainer/caption.h"
#include "trainer/retrieval.h"
#include "trainer/step.h"

typedef struct train_metrics train_metrics;

/* Opens <directory>/metrics.jsonl for appending; lines of steps after `step` (a run that went on and was
 * lost) are removed first. Plans the line's buffer. Local, rank 0. */
CORE_NODISCARD core_status train_metrics_open(const char *directory, int64_t step, const train_model *model,
                                              train_metrics **out);
/* position: after the step. No allocation. */
CORE_NODISCARD core_status train_metrics_step(train_metrics *metrics, const train_report *report,
                                              const train_contrastive *contrastive,
                                              const data_position *position);
CORE_NODISCARD core_status train_metrics_evaluation(train_metrics *metrics, int64_t step,
                                                    const train_retrieval *result);
/* The line of an evaluation on `out`, for who has no run directory. Local. */
CORE_NODISCARD core_status train_metrics_print(const train_model *model, int64_t step,
                                               const train_retrieval *result, FILE *out);
CORE_NODISCARD core_status train_metrics_caption(train_metrics *metrics, int64_t step,
                                                 const train_caption *result);
void train_metrics_close(train_metrics *metrics);

#endif
