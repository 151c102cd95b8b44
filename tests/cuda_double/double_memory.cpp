/* Memory of the device and page-locked memory. Each allocation has pages of its own: one that faults on each
 * side, bytes of a known pattern up to them, and it ends at the last 256-byte boundary that its size allows,
 * as most overruns go upwards. Fresh memory is NaN in every type. Between operations device memory has no
 * access rights at all: host code that follows a device pointer stops there and then. */
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "tests/cuda_double/double_impl.h"

namespace cuda_double {

constexpr size_t page = 4096, alignment = 256;
constexpr int pattern = 0xa5, fresh = 0xff;

struct Allocation {
  char *user;
  size_t bytes;
  char *pages; /* between the two that fault */
  size_t length;
  Kind kind;
};

static std::map<uintptr_t, Allocation> alive; /* by the first page, that which faults included */
static size_t used;
static int open_count;

static const Allocation *find(const void *pointer) {
  auto after = alive.upper_bound((uintptr_t)pointer);
  if (after == alive.begin()) return nullptr;
  const Allocation &one = std::prev(after)->second;
  return (const char *)pointer < one.pages + one.length + page ? &one : nullptr;
}

static const char *name_of(Kind kind) {
  return kind == Kind::device ? "device" : "page-locked";
}

Kind kind_of(const void *pointer) {
  const Allocation *one = find(pointer);
  return one ? one->kind : Kind::pageable;
}

bool inside(const void *pointer, size_t bytes, const char *what) {
  const Allocation *one = find(pointer);
  auto *first = (const char *)pointer;
  if (!one || (first >= one->user && first + bytes <= one->user + one->bytes)) return true;
  report(true, "%s touches bytes %td to %td of %zu bytes of %s memory", what, first - one->user,
         first - one->user + (ptrdiff_t)bytes, one->bytes, name_of(one->kind));
  return false;
}

/* ---- rights ----
 * Device memory has none, and gets them piece by piece when an operation first touches it: giving all of it
 * rights for every operation would cost in proportion to what is allocated. */

constexpr size_t piece = 256 << 10;
static std::vector<Range> opened; /* pieces with rights, until the operation ends */

static void watch_faults();

/* Whoever else handles faults (a test's framework, once for each test) does not know what was touched. */
Access::Access() {
  if (open_count++ == 0) watch_faults();
}

Access::~Access() {
  if (--open_count > 0) return;
  for (Range range : opened) mprotect(range.data, range.bytes, PROT_NONE);
  opened.clear();
}

/* False: it is not closed memory of a device that was touched while an operation runs. */
static bool give_rights(const Allocation *one, char *address) {
  if (!one || open_count == 0 || one->kind != Kind::device || !settings().protect) return false;
  if (address < one->pages || address >= one->pages + one->length) return false;
  size_t first = (size_t)(address - one->pages) / piece * piece;
  Range range = {one->pages + first, std::min(piece, one->length - first)};
  for (const Range &other : opened)
    if (other.data == range.data) return false;
  opened.push_back(range);
  return mprotect(range.data, range.bytes, PROT_READ | PROT_WRITE) == 0;
}

static void say(const char *text) {
  if (write(STDERR_FILENO, text, strlen(text)) < 0) return;
}

/* Says what was touched and by whom, then lets the fault happen again without a handler. */
static void on_fault(int signal, siginfo_t *info, void *) {
  char text[512];
  const Allocation *one = find(info->si_addr);
  if (give_rights(one, (char *)info->si_addr)) return;
  std::string who = running();
  if (one)
    snprintf(text, sizeof text, "emulated CUDA: %s touches byte %td of %zu bytes of %s memory\n",
             who.empty() ? "host code" : who.c_str(), (char *)info->si_addr - one->user, one->bytes,
             name_of(one->kind));
  else
    snprintf(text, sizeof text, "emulated CUDA: %s touches %p, which is no memory of the device\n",
             who.c_str(), info->si_addr);
  if (one || !who.empty()) say(text);
  ::signal(signal, SIG_DFL);
}

static void watch_faults() {
  static char stack[65536];
  stack_t alternative = {};
  struct sigaction action = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaltstack(&alternative, nullptr);
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

/* ---- guards ---- */

static bool guards_hold(const Allocation &one) {
  for (const char *c = one.pages; c < one.pages + one.length; c++) {
    if (c == one.user) c += one.bytes;
    if (c < one.pages + one.length && *c != (char)pattern) {
      report(false, "byte %td of %zu bytes of %s memory was overwritten", c - one.user, one.bytes,
             name_of(one.kind));
      return false;
    }
  }
  return true;
}

static void check_at_exit() {
  cuda_double_check_guards();
  if (*cuda_double_reports() && !getenv("CUDA_DOUBLE_FORGIVE")) _exit(86);
}

static void begin_once() {
  static bool begun;
  if (begun) return;
  begun = true;
  settings();
  watch_faults();
  atexit(check_at_exit);
}

/* ---- allocate, free ---- */

static cudaError_t allocate(void **out, size_t bytes, Kind kind) {
  begin_once();
  *out = nullptr;
  if (context_error() != cudaSuccess) return result(context_error());
  if (strikes(&faults().allocation)) return result(cudaErrorMemoryAllocation);
  if (kind == Kind::device && bytes > settings().memory - used) return result(cudaErrorMemoryAllocation);
  if (bytes == 0) return result(cudaSuccess);
  size_t room = (bytes + alignment - 1) / alignment * alignment, length = (room + page - 1) / page * page;
  void *memory =
      mmap(nullptr, length + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return result(cudaErrorMemoryAllocation);
  char *pages = (char *)memory + page;
  mprotect(pages, length, PROT_READ | PROT_WRITE);
  Allocation one = {pages + length - room, bytes, pages, length, kind};
  memset(pages, pattern, length);
  memset(one.user, fresh, bytes);
  alive[(uintptr_t)memory] = one;
  if (kind == Kind::device) used += bytes;
  if (kind == Kind::device && open_count == 0 && settings().protect) mprotect(pages, length, PROT_NONE);
  *out = one.user;
  return result(cudaSuccess);
}

/* As on a GPU, freeing waits for everything that might still use the memory. */
static cudaError_t release(void *pointer, Kind kind) {
  if (!pointer) return result(cudaSuccess);
  const Allocation *one = find(pointer);
  if (!one || one->user != pointer || one->kind != kind) {
    report(false, "%p is freed and is no %s allocation", pointer, name_of(kind));
    return result(cudaErrorInvalidValue);
  }
  if (!drain(30)) report(false, "memory is freed while work waits that does not end");
  {
    Access access;
    guards_hold(*one);
  }
  if (kind == Kind::device) used -= one->bytes;
  char *memory = one->pages - page;
  size_t length = one->length + 2 * page;
  alive.erase((uintptr_t)memory);
  munmap(memory, length);
  return result(cudaSuccess);
}

}  // namespace cuda_double

using namespace cuda_double;

void cuda_double_check_guards(void) {
  Guard guard(lock());
  Access access;
  for (const auto &[key, one] : alive) guards_hold(one);
}

int64_t cuda_double_allocations(void) {
  Guard guard(lock());
  return (int64_t)alive.size();
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
  Guard guard(lock());
  return allocate(out, bytes, Kind::device);
}

cudaError_t cudaFree(void *pointer) {
  Guard guard(lock());
  return release(pointer, Kind::device);
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned) {
  Guard guard(lock());
  return allocate(out, bytes, Kind::pinned);
}

cudaError_t cudaMallocHost(void **out, size_t bytes) {
  return cudaHostAlloc(out, bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void *pointer) {
  Guard guard(lock());
  return release(pointer, Kind::pinned);
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  Guard guard(lock());
  *total = settings().memory;
  *available = settings().memory - used;
  return result(cudaSuccess);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
  Guard guard(lock());
  Kind kind = kind_of(pointer);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = kind == Kind::device   ? cudaMemoryTypeDevice
                     : kind == Kind::pinned ? cudaMemoryTypeHost
                                            : cudaMemoryTypeUnregistered;
  if (kind != Kind::pageable) attributes->devicePointer = const_cast<void *>(pointer);
  if (kind == Kind::pinned) attributes->hostPointer = const_cast<void *>(pointer);
  return result(cudaSuccess);
}
