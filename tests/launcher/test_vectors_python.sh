# Vectors files read with h5py, as the page says; skipped where it is not installed.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/serve_lib.sh"
: "${PYTHON:?the interpreter}"
prepare_serving
what="h5py"
embed 2 "$work/run" --key text -o "$work/key.h5"
embed 2 "$work/run" --query image:text --dtype float16 -o "$work/query.h5"
"$PYTHON" "$(dirname "$0")/read_vectors.py" "$work/key.h5" "$work/query.h5" >"$work/python" 2>"$work/err"
status=$?
if [ $status = 77 ]; then
  cat "$work/python"
  exit 77
fi
expect_status 0
expect_text "$work/python" "50 keys of text, 50 queries of image:text"
what="the best match by numpy, and by search"
run 1 search "$work/key.h5" --query "$work/query.h5" -k 1
sed 1d "$work/python" >"$work/expected"
sed 1d "$work/out" | awk '{print $1, $3}' >"$work/got"
expect_same_file "answers" "$work/expected" "$work/got"
finish
