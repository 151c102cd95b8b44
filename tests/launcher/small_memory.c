/* A machine with little memory, preloaded: sysconf says that it has SMALL_MEMORY_MIB in all. */
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

long sysconf(int name) {
  static long (*real)(int);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "sysconf");
  const char *mebibytes = getenv("SMALL_MEMORY_MIB");
  if (name == _SC_PHYS_PAGES && mebibytes) return atol(mebibytes) * ((1 << 20) / real(_SC_PAGESIZE));
  return real(name);
}
