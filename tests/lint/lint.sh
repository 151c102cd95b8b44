#!/bin/sh
# lint.sh [ROOT]: the rules of CONVENTIONS that can be read off the sources. One line a violation, exit status 1
# if there is any. What each rule says stands beside it.
here=$(cd "$(dirname "$0")" && pwd)
cd "${1:-$here/../..}" || exit 2
folders="core kernels comm data checkpoint trainer launcher"
violations=$(mktemp) || exit 2
trap 'rm -f "$violations"' EXIT

existing() { for f in "$@"; do [ -d "$f" ] && echo "$f"; done; }
sources() { # folders... : their C and CUDA sources
  # shellcheck disable=SC2046
  find $(existing "$@") -name build -prune -o \( -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print | LC_ALL=C sort
}

# include order, *_impl.h, third-party headers, prefixes, ways to end the process
# shellcheck disable=SC2046,SC2086
awk -f "$here/source_rules.awk" $(sources $folders tests) >"$violations"

# a source file's name is unique in the tree, extension included
# shellcheck disable=SC2086
sources $folders tests experiments | awk -F/ '
  $NF in first { print $0 ": the file name is taken by " first[$NF]; next }
  { first[$NF] = $0 }' >>"$violations"

# nothing is left to be done
# shellcheck disable=SC2046,SC2086
grep -rnIE '(^|[^A-Za-z0-9_])(TO''DO|FIX''ME|XX''X)([^A-Za-z0-9_]|$)' --exclude-dir=build \
  $(existing $folders tests experiments slurm) | sed 's/^\([^:]*:[0-9]*\):.*/\1: a note of something to be done/' >>"$violations"

# every folder explains itself
# shellcheck disable=SC2086
for f in $(existing $folders tests experiments slurm); do
  [ -s "$f/README.md" ] || echo "$f: has no README.md" >>"$violations"
done

[ -s "$violations" ] || exit 0
cat "$violations"
echo "$(wc -l <"$violations") violations"
exit 1
