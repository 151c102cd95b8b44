/* The program's own symbol table: names of kernels, and where `__shared__` variables lie. The latter are the
 * thread-local variables that are local to a C++ function (mangled names begin with _ZZ). */
#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "tests/cuda_double/double_impl.h"

namespace cuda_double {

struct Table {
  std::map<uintptr_t, std::string> function;       /* by address in the file */
  std::vector<std::pair<size_t, size_t>> variable; /* offset in the thread's block, bytes */
};

static std::vector<char> program() {
  std::vector<char> bytes;
  FILE *file = fopen("/proc/self/exe", "rb");
  if (!file) return bytes;
  fseek(file, 0, SEEK_END);
  bytes.resize((size_t)ftell(file));
  rewind(file);
  if (fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) bytes.clear();
  fclose(file);
  return bytes;
}

static void add(Table *table, const ElfW(Sym) & symbol, const char *name) {
  int type = ELF64_ST_TYPE(symbol.st_info);
  if (type == STT_FUNC && symbol.st_size > 0) table->function[symbol.st_value] = name;
  if (type == STT_TLS && strncmp(name, "_ZZ", 3) == 0)
    table->variable.emplace_back(symbol.st_value, symbol.st_size);
}

static const Table &table() {
  static const Table all = [] {
    Table result;
    std::vector<char> bytes = program();
    if (bytes.size() < sizeof(ElfW(Ehdr))) return result;
    auto *header = (const ElfW(Ehdr) *)bytes.data();
    auto *section = (const ElfW(Shdr) *)(bytes.data() + header->e_shoff);
    for (int i = 0; i < header->e_shnum; i++) {
      if (section[i].sh_type != SHT_SYMTAB) continue;
      auto *symbol = (const ElfW(Sym) *)(bytes.data() + section[i].sh_offset);
      const char *names = bytes.data() + section[section[i].sh_link].sh_offset;
      for (size_t s = 0; s < section[i].sh_size / sizeof *symbol; s++)
        add(&result, symbol[s], names + symbol[s].st_name);
    }
    return result;
  }();
  return all;
}

struct Place {
  uintptr_t base; /* where the program was loaded */
  char *local;    /* this thread's block of its thread-local variables */
};

static int first_object(dl_phdr_info *info, size_t, void *out) {
  *(Place *)out = {info->dlpi_addr, (char *)info->dlpi_tls_data};
  return 1;
}

static Place place() {
  Place result = {};
  dl_iterate_phdr(first_object, &result);
  return result;
}

/* Without the result and the parameters: "name<arguments>". */
static std::string shorten(const std::string &name) {
  int depth = 0;
  size_t begin = name.rfind("void ", 0) == 0 ? 5 : 0, at = begin;
  for (; at < name.size(); at++) {
    if (name[at] == '<') depth++;
    if (name[at] == '>') depth--;
    if (name[at] == '(' && depth == 0 && name.compare(at, 10, "(anonymous") != 0) break;
  }
  return name.substr(begin, at - begin);
}

std::string symbol_of(const void *address) {
  auto found = table().function.find((uintptr_t)address - place().base);
  if (found == table().function.end()) return "?";
  int status = 0;
  char *readable = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, &status);
  std::string name = readable ? readable : found->second;
  free(readable);
  return shorten(name);
}

/* Not inside the function: there they would be taken for variables of a kernel. */
static thread_local std::vector<Range> variables;
static thread_local bool variables_known;

const std::vector<Range> &shared_variables() {
  Place here = place();
  if (!variables_known && here.local)
    for (auto [offset, bytes] : table().variable) variables.push_back({here.local + offset, bytes});
  variables_known = true;
  return variables;
}

}  // namespace cuda_double
