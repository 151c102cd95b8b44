/* Fibres: flows of control with a stack of their own that change places by a function call. */
#ifndef CUDA_DOUBLE_FIBRE_H
#define CUDA_DOUBLE_FIBRE_H

#if !defined(__x86_64__) || defined(CUDA_DOUBLE_UCONTEXT)
#include <ucontext.h>
#define CUDA_DOUBLE_PORTABLE 1
#endif

namespace cuda_double {

struct Fibre {
#ifdef CUDA_DOUBLE_PORTABLE
  ucontext_t context;
#else
  void *top; /* stack pointer while it does not run */
#endif
  char *stack; /* nullptr: the flow that the program began with */
};

constexpr unsigned long fibre_stack = 128 << 10;

/* A fibre with a stack and a page below it that faults. */
Fibre *fibre_create();
/* Makes the fibre begin (again) with `entry`, which must not return. */
void fibre_begin(Fibre *fibre, void (*entry)());
void fibre_switch(Fibre *from, Fibre *to);

}  // namespace cuda_double

#endif
