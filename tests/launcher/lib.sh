# Helpers of the end-to-end tests; each test file reads this first.
#
# A job runs in the background under a limit of time. Every process notes its id, so that a test can reach
# mpirun ($work/pid.mpirun) and each rank ($work/pid.0, ...). What it prints goes to $work/out and $work/err.
# Expectations print what was expected and what came; the test goes on and fails at its end.

: "${ANTIPHON:?the command under test}" "${MAKE_SET:?tests/launcher/make_set}" "${MPIEXEC:?mpirun}"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=0}"
unset ANTIPHON_FAULT_FILE ANTIPHON_TRACE

work=$(mktemp -d "${TMPDIR:-/tmp}/antiphon-test.XXXXXX") || exit 1
failures=0
mounted=
limit=${LIMIT:-90} # seconds that a job may take

kill_job() {
  for file in "$work"/pid.*; do
    [ -f "$file" ] && kill -CONT "$(cat "$file")" 2>/dev/null
    [ -f "$file" ] && kill -KILL "$(cat "$file")" 2>/dev/null
  done
  rm -f "$work"/pid.*
}

clean_up() {
  kill_job
  [ -n "$mounted" ] && umount "$mounted" 2>/dev/null
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 1' HUP INT TERM

cat >"$work/rank.sh" <<'END'
echo $$ >"$WORK/pid.${OMPI_COMM_WORLD_RANK:-0}"
exec "$ANTIPHON" "$@"
END
cat >"$work/mpirun.sh" <<'END'
echo $$ >"$WORK/pid.mpirun"
exec "$MPIEXEC" --oversubscribe -n "$RANKS" sh "$WORK/rank.sh" "$@"
END
export WORK="$work" ANTIPHON MPIEXEC

# ---- saying ----

note() {
  printf '%s\n' "-- $*"
}

show() { # file
  grep -v -e '^---' -e '^$' -e '^Primary job' -e '^a non-zero exit' -e '^mpirun detected' -e '^the job to be' "$1" |
    sed -n '1,8p' | cut -c 1-400 | sed 's/^/     | /'
}

fail() {
  failures=$((failures + 1))
  printf '%s\n' "FAILED $what: $*"
  [ -s "$work/err" ] && show "$work/err"
  return 0
}

finish() {
  [ "$failures" -eq 0 ] && exit 0
  echo "$failures expectations failed"
  exit 1
}

# ---- running ----

# start RANKS ARGUMENTS...: one rank runs without mpirun.
start() {
  RANKS=$1
  export RANKS
  shift
  rm -f "$work"/pid.* "$work/status" "$work/hung"
  began=$(date +%s)
  script=$work/mpirun.sh
  [ "$RANKS" = 1 ] && script=$work/rank.sh
  (
    sh "$script" "$@" >"$work/out" 2>"$work/err" </dev/null
    echo $? >"$work/status.new"
    mv "$work/status.new" "$work/status"
  ) 2>/dev/null &
  started=$!
}

# Kills the job when the limit of time has passed; ends soon after the job by itself.
guard() {
  (
    left=$limit
    while kill -0 "$started" 2>/dev/null; do
      if [ "$left" -le 0 ]; then
        : >"$work/hung"
        kill_job
        break
      fi
      left=$((left - 1))
      sleep 1
    done
  ) >/dev/null 2>&1 &
}

# Waits for the job; sets status ("hung" when the limit passed) and seconds. Sleeps meanwhile: asking every moment would
# take the processor from the job.
wait_job() {
  guard
  wait "$started"
  seconds=$(($(date +%s) - began))
  status=$(cat "$work/status")
  [ ! -e "$work/hung" ] || status=hung
}

run() {
  start "$@"
  wait_job
}

pid() { # rank, or "mpirun"
  cat "$work/pid.$1" 2>/dev/null
}

lines() { # file: its lines, 0 if there is none
  if [ -f "$1" ]; then wc -l <"$1"; else echo 0; fi
}

# until_true SECONDS COMMAND...: false when the job ended or the time passed first.
until_true() {
  left=$(($1 * 50))
  shift
  while ! "$@"; do
    [ -f "$work/status" ] && return 1
    left=$((left - 1))
    [ "$left" -gt 0 ] || return 1
    sleep 0.02
  done
}

has_lines() { # file count
  [ "$(lines "$1")" -ge "$2" ]
}

says() { # words: the job has printed them
  grep -q -- "$1" "$work/err"
}

# A run with the N-th file operation on paths that contain WORD failing: fault N ERRNO-or-exit WORD RANKS ...
fault() {
  ANTIPHON_FAULT_FILE=$1:$2:$3
  export ANTIPHON_FAULT_FILE
  shift 3
  run "$@"
  unset ANTIPHON_FAULT_FILE
}

# operations ERRNO-or-exit WORD COMMAND... -- RANKS ARGUMENTS...: sets many, the number of the last operation that
# matters. The command tells whether the run it follows met the fault. The run directory is removed before each.
operations() {
  error=$1 word=$2 met=$3
  shift 3
  low=0 many=64
  rm -rf "$work/run"
  fault $many "$error" "$word" "$@"
  while $met; do
    low=$many many=$((2 * many))
    rm -rf "$work/run"
    fault $many "$error" "$word" "$@"
  done
  while [ $((many - low)) -gt 1 ]; do
    middle=$(((low + many) / 2))
    rm -rf "$work/run"
    fault $middle "$error" "$word" "$@"
    if $met; then low=$middle; else many=$middle; fi
  done
  many=$low
}

# First, last and some of the operations between
chosen() { # many first last between
  seq 1 "$1" | awk -v n="$1" -v a="$2" -v b="$3" -v c="$4" \
    '$1 <= a || $1 > n - b || (c > 0 && $1 % (int((n - a - b) / c) + 1) == 0)'
}

# ---- expecting ----

expect_status() {
  [ "$status" = "$1" ] || fail "expected exit status $1, got $status after $seconds s"
}

expect_text() { # file words...
  file=$1
  shift
  for words in "$@"; do
    grep -qF -- "$words" "$file" || fail "expected \"$words\" in $(basename "$file")"
  done
}

expect_equal() { # name expected got
  [ "$2" = "$3" ] || fail "$1: expected $2, got $3"
}

expect_same_file() { # name expected got
  cmp -s "$2" "$3" && return 0
  fail "$1 differ; expected <, got >"
  diff "$2" "$3" | cut -c 1-300 | sed -n '1,6p' | sed 's/^/     | /'
}

# Exactly one error message for all ranks, without frames, and it contains the words.
expect_error() {
  count=$(grep -c 'error: ' "$work/err")
  [ "$count" = 1 ] || fail "expected one error message, got $count"
  grep -q '^    in ' "$work/err" && fail "a backtrace was printed without ANTIPHON_TRACE"
  grep 'error: ' "$work/err" >"$work/error-line"
  expect_text "$work/error-line" "$@"
}

# ---- runs ----

# Writes the configuration of a tiny tower; what a test needs otherwise it gives by --set. A save is published before the
# next one is due, so that what lies on the disk at a step is known.
write_config() { # file directory-of-data run-directory
  cat >"$1" <<END
run: {directory: $3, seed: 7, steps: 20, log: 5, deadline: 60, threads: 1}
data:
  path: $2
  shuffle: 16
  cache: 8
  modalities:
    - {name: image, length: 8, local: 0.01, global: 0.01, experts: 2}
    - {name: text, length: 8}
model: {width: 16, layers: 2, heads: 2, hidden: 24, embedding: 8, moe: {layers: all, experts: 4, group_samples: 2}}
optimizer: {batch: 8, rate: 0.003, warmup: 2}
checkpoint: {interval: 0, keep: 10, busy: wait, buffers: 1}
evaluate: {batch: 16, at_end: false}
END
}

# Sound data in $work/data, a configuration in $work/config.yaml with run.directory $work/run.
prepare() {
  "$MAKE_SET" directory="$work/data/train" "$@" || exit 1
  "$MAKE_SET" directory="$work/data/validation" samples=21 shards=1 first=5000 || exit 1
  write_config "$work/config.yaml" "$work/data" "$work/run"
}

step_path() { # run-directory step
  printf '%s/checkpoints/step-%08d' "$1" "$2"
}

content() { # checkpoint: hash of its tensors; the stored meta is not part of it
  "$ANTIPHON" inspect "$1" 2>/dev/null | sed -n '2s/.*content \([0-9a-f]*\).*/\1/p'
}

# metrics.jsonl without what depends on time
metrics() { # run-directory out
  sed -e 's/"seconds":{[^}]*},//' -e 's/"tokens_per_second":{[^}]*},//' -e 's/"seconds":[-+.e0-9]*,//' \
    "$1/metrics.jsonl" >"$2"
}

# Step numbers of the training lines, or of the evaluation lines
steps_of() { # run-directory
  grep -v '"evaluation"' "$1/metrics.jsonl" | sed 's/{"step":\([0-9]*\),.*/\1/' | tr '\n' ' '
}

evaluations_of() { # run-directory
  grep '"evaluation"' "$1/metrics.jsonl" | sed 's/{"step":\([0-9]*\),.*/\1/' | tr '\n' ' '
}

expect_steps() { # run-directory last [first]
  expect_equal "steps in metrics.jsonl" "$(seq "${3:-1}" "$2" | tr '\n' ' ')" "$(steps_of "$1")"
}

# Largest relative difference of the losses of equal steps, compared with a tolerance.
expect_close() { # tolerance run-directory run-directory
  for directory in "$2" "$3"; do
    grep -v '"evaluation"' "$directory/metrics.jsonl" |
      sed 's/{"step":\([0-9]*\),.*"loss":\([^,]*\),"contrastive".*/\1 \2/' >"$work/loss.$(basename "$directory")"
  done
  worst=$(awk -v tolerance="$1" 'NR == FNR {loss[$1] = $2; next}
    {d = $2 - loss[$1]; if (d < 0) d = -d; m = loss[$1] < 0 ? -loss[$1] : loss[$1]; n++
     if (!($1 in loss) || !(d <= tolerance * m)) bad = bad " step " $1 ": " loss[$1] " and " $2 ";"}
    END {if (n == 0) print "no steps to compare"; else print bad}' \
    "$work/loss.$(basename "$2")" "$work/loss.$(basename "$3")")
  [ -z "$worst" ] || fail "losses differ by more than $1 of their size:$worst"
}
