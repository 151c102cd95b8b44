/* A fuzz target: what libFuzzer calls with each input (its entry point has the name that libFuzzer fixes),
 * and the seeds that it starts from. One source file a target; fuzz_driver.c runs it without libFuzzer. */
#ifndef FUZZ_TARGET_H
#define FUZZ_TARGET_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count);

/* Seed number `index` into `out`; returns its bytes, 0 when there is none of this number. */
int64_t fuzz_seed(int index, uint8_t *out, int64_t capacity);

/* A directory of the process for files, made at the first call and removed when the process ends. */
const char *fuzz_directory(void);
void fuzz_write(const char *path, const uint8_t *bytes, size_t count);
int64_t fuzz_read(const char *path, uint8_t *out, int64_t capacity);
/* Streams everything of <directory>/train, modality image, and gives up at the first error. */
void fuzz_stream(const char *directory);

#endif
