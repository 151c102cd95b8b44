/* The switch saves what a function call must preserve (System V ABI: rbx, rbp, r12-r15; nobody here changes
 * floating-point control words) and exchanges stacks. swapcontext would do, but asks the kernel each time. */
#include "tests/cuda_double/double_fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_double {

constexpr unsigned long guard = 4096;

/* What ran on the stack before did not return from its functions, so their redzones are still marked. */
static void forget_frames(const Fibre *fibre) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fibre->stack, fibre_stack);
#else
  (void)fibre;
#endif
}

static char *stack_create() {
  void *memory = mmap(nullptr, fibre_stack + guard, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
    fprintf(stderr, "emulated CUDA: no memory for a fibre's stack\n");
    abort();
  }
  return (char *)memory + guard;
}

#ifdef CUDA_DOUBLE_PORTABLE

Fibre *fibre_create() {
  return new Fibre{{}, stack_create()};
}

void fibre_begin(Fibre *fibre, void (*entry)()) {
  forget_frames(fibre);
  getcontext(&fibre->context);
  fibre->context.uc_stack.ss_sp = fibre->stack;
  fibre->context.uc_stack.ss_size = fibre_stack;
  fibre->context.uc_link = nullptr;
  makecontext(&fibre->context, entry, 0);
}

void fibre_switch(Fibre *from, Fibre *to) {
  swapcontext(&from->context, &to->context);
}

#else

/* rdi: where to keep this stack pointer; rsi: the one to continue with */
extern "C" void cuda_double_exchange_stacks(void **keep, void *next);
__asm__(
    ".text\n"
    ".globl cuda_double_exchange_stacks\n"
    ".type cuda_double_exchange_stacks, @function\n"
    "cuda_double_exchange_stacks:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size cuda_double_exchange_stacks, .-cuda_double_exchange_stacks\n");

Fibre *fibre_create() {
  return new Fibre{nullptr, stack_create()};
}

void fibre_begin(Fibre *fibre, void (*entry)()) {
  forget_frames(fibre);
  auto *top = (uint64_t *)(fibre->stack + fibre_stack);
  *--top = 0;               /* keeps the stack aligned as at a call */
  *--top = (uint64_t)entry; /* what the switch returns to */
  for (int i = 0; i < 6; i++) *--top = 0;
  fibre->top = top;
}

void fibre_switch(Fibre *from, Fibre *to) {
  cuda_double_exchange_stacks(&from->top, to->top);
}

#endif

}  // namespace cuda_double
