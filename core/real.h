/* core_real: the type in which the CPU backend computes. float in the product, double in the build that
 * checks gradients by central differences (cmake preset `double`). */
#ifndef CORE_REAL_H
#define CORE_REAL_H

#include <math.h>

#ifdef ANTIPHON_DOUBLE
typedef double core_real;
#define CORE_REAL_DTYPE CORE_FLOAT64
#define core_real_exp exp
#define core_real_log log
#define core_real_sqrt sqrt
#define core_real_erf erf
#define core_real_tanh tanh
#define core_real_fabs fabs
#else
typedef float core_real;
#define CORE_REAL_DTYPE CORE_FLOAT32
#define core_real_exp expf
#define core_real_log logf
#define core_real_sqrt sqrtf
#define core_real_erf erff
#define core_real_tanh tanhf
#define core_real_fabs fabsf
#endif

#endif
