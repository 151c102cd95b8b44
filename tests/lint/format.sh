#!/bin/sh
# format.sh [ROOT]: all sources are as clang-format leaves them.
here=$(cd "$(dirname "$0")" && pwd)
cd "${1:-$here/../..}" || exit 2
if ! command -v clang-format >/dev/null 2>&1; then
  echo "skipped: clang-format is not installed"
  exit 77
fi
if ! clang-format --version | grep -q 'version 14\.'; then # other versions break lines otherwise
  echo "skipped: clang-format is not version 14, Debian 12's"
  exit 77
fi
files=$(find core kernels comm data checkpoint trainer launcher tests -name build -prune -o \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' \) -print)
# shellcheck disable=SC2086
wrong=$(clang-format --dry-run -Werror $files 2>&1 | sed -n 's/^\([^: ]*\):[0-9]*:.*/\1/p' | sort -u)
[ -z "$wrong" ] && exit 0
echo "$wrong" | sed 's/$/: run clang-format -i on it/'
exit 1
