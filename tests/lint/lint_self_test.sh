#!/bin/sh
# lint_self_test.sh [ROOT]: the lint finds what it is there to find. Violations are planted one at a time in a
# copy of the sources; each must be complained of, and was not before.
here=$(cd "$(dirname "$0")" && pwd)
root=${1:-$here/../..}
copy=$(mktemp -d) || exit 1
trap 'rm -rf "$copy"' EXIT
failures=0
cd "$root" || exit 1
for f in core kernels comm data checkpoint trainer launcher tests experiments slurm; do
  [ -d "$f" ] && find "$f" -name build -prune -o -type f \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name README.md \
    -o -name '*.sh' -o -name '*.yaml' -o -name '*.py' \) -print
done | tar cf - -T - | tar xf - -C "$copy" || exit 1
cd "$copy" || exit 1
sh "$here/lint.sh" "$copy" >"$copy/.before"

# FILE LINE COMPLAINT: appends the line to the file
plant() {
  new=0
  [ -e "$1" ] || new=1
  [ $new -eq 1 ] || cp "$1" .saved
  mkdir -p "$(dirname "$1")"
  printf '%s\n' "$2" >>"$1"
  expect "$1" "$3"
  if [ $new -eq 1 ]; then rm "$1"; rmdir "$(dirname "$1")" 2>/dev/null; else mv .saved "$1"; fi
}

# FILE COMPLAINT: the lint fails and complains so of the file
expect() {
  if sh "$here/lint.sh" "$copy" >.after; then
    failures=$((failures + 1))
    echo "FAILED: passes with a violation in $1: $2"
  elif ! grep -F "$1" .after | grep -Fv -f .known | grep -Fq -- "$2"; then
    failures=$((failures + 1))
    echo "FAILED: does not complain of $1: $2"
    grep -Fv -f .known .after
  fi
}

# FILE LINE: appends a line that is legal
legal() {
  cp "$1" .saved
  printf '%s\n' "$2" >>"$1"
  sh "$here/lint.sh" "$copy" >.after
  if ! cmp -s .before .after; then
    failures=$((failures + 1))
    echo "FAILED: complains of what is legal in $1: $2"
    grep -Fv -f .known .after
  fi
  mv .saved "$1"
}

# patterns for grep -f: with an empty file it would match nothing, with an empty line everything
{ echo "(no violations before)"; grep -v ' violations$' .before; } >.known
plant core/arena.c '#include "comm/comm.h"' 'core may include core'
plant core/arena.h '#  include  "kernels/kernels.h"' 'core may include core'
plant kernels/select.c '#include "comm/comm.h"' 'kernels may include core kernels'
plant comm/group.c '#include "data/data.h"' 'comm may include core comm'
plant data/data_order.c '#include "kernels/kernels.h"' 'data may include core data'
plant checkpoint/save.c '#include "data/data.h"' 'checkpoint may include core comm checkpoint'
plant trainer/step.c '#include "launcher/launcher.h"' 'trainer may include'
plant trainer/step.c '#include "tests/support/test_set.h"' 'trainer may include'
plant trainer/step.c '#include <mpi.h>' 'mpi.h, which belongs to comm'
plant kernels/select.c '#include <oneapi/dnnl/dnnl.h>' 'which belongs to kernels/cpu'
plant kernels/cpu/gelu.c '#include <cuda_runtime.h>' 'which belongs to kernels/cuda'
plant comm/group.c '#include <hdf5.h>' 'which belongs to data'
plant core/log.c '#include <glib.h>' 'of no library that is used'
plant trainer/step.c '#include "comm/comm_impl.h"' 'private to comm'
plant tests/data/test_planted.c '#include "checkpoint/checkpoint_impl.h"' 'private to checkpoint'
plant checkpoint/arena.c 'int x;' 'is taken by'
plant tests/core/comm.h 'int x;' 'is taken by'
plant core/clock.h 'double now(void);' 'declares now'
plant comm/comm.h 'CORE_NODISCARD core_status make_group(comm_group *group,' 'declares make_group'
plant data/data.h 'static inline int64_t rows_of(int64_t n) {' 'declares rows_of'
plant trainer/layout.h 'extern const int most_ranks;' 'declares most_ranks'
plant launcher/launcher.h 'core_status *train_all(int argc);' 'names of launcher begin with launch_'
plant checkpoint/save.c 'static void give_up(void) { exit(1); }' 'calls exit()'
plant comm/comm.c 'static void give_up(void) { abort(); }' 'calls abort()'
plant core/log.c 'static void give_up(void) { _exit (3); }' 'calls _exit()'
plant kernels/kernels.h "/* TO""DO: more */" 'something to be done'
plant slurm/notes.sh "# FIX""ME" 'something to be done'
plant tests/core/planted.txt "XX""X" 'something to be done'
mv comm/README.md .readme 2>/dev/null
expect comm 'has no README.md'
mv .readme comm/README.md 2>/dev/null
legal core/log.c '/* #include "comm/comm.h" and exit(1) in a comment */'
legal core/log.c 'static const char *const text = "exit(1)"; // abort()'
legal core/log.c 'static void at_exit(void) { on_exit(0, 0); x.exit(1); }'
legal core/clock.h 'static inline double core_clock_twice(double x) {'
legal launcher/main.c '#include "core/log.h"'
legal comm/agree.c '#include <mpi.h>'
[ $failures -eq 0 ]
