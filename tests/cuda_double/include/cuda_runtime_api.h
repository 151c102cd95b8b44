/* As in CUDA: the runtime by its other name. */
#ifndef CUDA_DOUBLE_CUDA_RUNTIME_API_H
#define CUDA_DOUBLE_CUDA_RUNTIME_API_H

#include "cuda_runtime.h"

#endif
