# Saving fails: training goes on and says so, the previous checkpoint stays, a later save works.
. "$(dirname "$0")/lib.sh"

sets="--set run.steps=20 --set checkpoint.interval=5"

sound() { # steps...: these and no others are there, and sound
  expect_equal "checkpoints" "$*" "$(echo $(ls "$work/run/checkpoints" | sed 's/step-0*//'))"
  "$ANTIPHON" check "$work/run" >"$work/check" 2>&1 || fail "expected sound checkpoints: $(tail -1 "$work/check")"
}

prepare samples=45
run 1 train "$work/config.yaml" $sets
expect_status 0
whole=$(content "$(step_path "$work/run" 20)")

failed_save() {
  says 'warning: '
}

# Operations on files of one save fail: no space (28) at one rank, input/output error (5) at two. From the first that
# fails on all do, the removal of what is left included.
fail_each() { # RANKS ERRNO FIRST LAST BETWEEN [--set ...]
  ranks=$1 error=$2 choice="$3 $4 $5"
  shift 5
  what="counting the operations of a save, $ranks ranks"
  operations "$error" step-00000010 failed_save "$ranks" train "$work/config.yaml" $sets "$@"
  note "$what: $many"
  [ "$many" -ge 10 ] || fail "expected at least 10 operations, got $many"
  for operation in $(chosen "$many" $choice); do
    what="operation $operation of $many of a save fails with $error, $ranks ranks"
    rm -rf "$work/run"
    fault "$operation" "$error" step-00000010 "$ranks" train "$work/config.yaml" $sets "$@"
    expect_status 0
    expect_text "$work/err" "warning: " "step-00000010"
    rm -rf "$work/run/checkpoints/step-00000010" "$work/run/checkpoints/step-00000010.tmp"
    sound 5 15 20
    [ -n "$*" ] || expect_equal "content" "$whole" "$(content "$(step_path "$work/run" 20)")"
    expect_steps "$work/run" 20
  done
  what="the warning of a failed save, $ranks ranks"
  fault 2 "$error" step-00000010 "$ranks" train "$work/config.yaml" --set run.directory="$work/again" $sets "$@"
  expect_text "$work/err" "checkpoint of step 10 failed, training goes on"
  rm -rf "$work/again"
}
fail_each 1 28 8 12 6
fail_each 2 5 2 4 2 --set parallel.experts=2

what="the last save fails"
rm -rf "$work/run"
for errno in 28 5; do
  fault 2 $errno step-00000020 1 train "$work/config.yaml" $sets
  expect_status 1
  expect_error step-00000020
  rm -rf "$work/run/checkpoints/step-00000020.tmp"
  sound 5 10 15
done
run 1 train "$work/config.yaml" $sets
expect_status 0
expect_text "$work/err" "resumed at step 15"
expect_equal "content" "$whole" "$(content "$(step_path "$work/run" 20)")"

# ---- a disk that really is full ----

mkdir "$work/disk"
if mount -t tmpfs -o size=12m tmpfs "$work/disk" 2>/dev/null; then
  mounted=$work/disk
else
  note "not tried: a full tmpfs, because mounting is not permitted here"
  finish
fi

# full_disk RUN-DIRECTORY: fills up under a run until a save has failed, then there is room again.
full_disk() {
  start 1 train "$work/config.yaml" --set run.steps=4000 --set checkpoint.interval=200 --set checkpoint.keep=2 \
    --set run.directory="$1"
  until_true 30 has_lines "$1/metrics.jsonl" 50 || fail "expected 50 steps"
  head -c 20000000 /dev/zero >"$work/disk/filler" 2>/dev/null
  until_true 30 says 'training goes on' || fail "expected a warning that a save failed and training goes on"
  rm "$work/disk/filler"
  wait_job
  expect_status 0
  "$ANTIPHON" check "$1" >"$work/check" 2>&1 || fail "expected sound checkpoints: $(tail -1 "$work/check")"
}

what="checkpoints on a full disk"
rm -rf "$work/run"
mkdir -p "$work/run" "$work/disk/checkpoints"
ln -s "$work/disk/checkpoints" "$work/run/checkpoints"
full_disk "$work/run"
expect_steps "$work/run" 4000
[ -e "$(step_path "$work/run" 4000)" ] || fail "expected the checkpoint of the last step"
rm -rf "$work/disk/checkpoints"

what="the whole run directory on a full disk"
full_disk "$work/disk/run"

what="a new start where the disk was full"
run 1 train "$work/config.yaml" --set run.steps=4010 --set run.directory="$work/disk/run"
expect_status 0
expect_text "$work/err" "resumed at step"
expect_equal "the last step" 4010 "$(steps_of "$work/disk/run" | sed 's/.* \([0-9]*\) $/\1/')"
grep -v '^{.*}$' "$work/disk/run/metrics.jsonl" >"$work/torn"
expect_equal "torn lines in metrics.jsonl" 0 "$(lines "$work/torn")"

what="a start on a full disk"
head -c 20000000 /dev/zero >"$work/disk/filler" 2>/dev/null
run 1 train "$work/config.yaml" --set run.steps=4020 --set run.directory="$work/disk/run"
expect_status 1
expect_error "$work/disk/run" "No space left on device"
finish
