# Starts that go on from what is there, and those that are refused: nothing of an earlier run may be lost.
. "$(dirname "$0")/lib.sh"

inventory() { # out: every file of the run directory but the log, with its checksum
  (cd "$work/run" && find . -type f ! -name log.txt ! -name lock | LC_ALL=C sort | xargs cksum) >"$1"
}

# As run, but does not wait for other jobs.
run_beside() {
  start "$@"
  until_true $limit test -f "$work/status"
  status=$(cat "$work/status") seconds=$(($(date +%s) - began))
}

refused() { # words...
  expect_status 1
  expect_error "$@"
  inventory "$work/after"
  expect_same_file "files of the run" "$work/before" "$work/after"
}

prepare samples=45
run 1 train "$work/config.yaml" --set run.steps=12 --set checkpoint.interval=4
inventory "$work/before"
whole=$(content "$(step_path "$work/run" 12)")

for ranks in 1 2; do
  what="a finished run started again on $ranks ranks"
  run $ranks train "$work/config.yaml" --set run.steps=12 --set checkpoint.interval=4
  expect_status 0
  expect_text "$work/err" "resumed at step 12"
  expect_equal "content" "$whole" "$(content "$(step_path "$work/run" 12)")"
  expect_steps "$work/run" 12
done

what="a finished run evaluated again"
for each in 1 2; do
  run 1 train "$work/config.yaml" --set run.steps=3 --set run.directory="$work/evaluated" --set evaluate.at_end=true
  expect_status 0
  expect_equal "evaluations in metrics.jsonl" "3 " "$(evaluations_of "$work/evaluated")"
done

what="fewer steps than are done"
run 1 train "$work/config.yaml" --set run.steps=5 --set checkpoint.interval=4
expect_status 0
expect_equal "content" "$whole" "$(content "$(step_path "$work/run" 12)")"
expect_steps "$work/run" 12
run 1 train "$work/config.yaml" --set run.steps=12 --set checkpoint.interval=4
inventory "$work/before"

for ranks in 1 2; do
  what="--resume never beside checkpoints, $ranks ranks"
  run $ranks train "$work/config.yaml" --resume never --set run.steps=99
  refused "checkpoints" "--resume auto" "run.directory"

  what="--resume of a path that does not exist, $ranks ranks"
  run $ranks train "$work/config.yaml" --resume "$work/nowhere" --set run.steps=99
  refused "$work/nowhere"

  what="another model, $ranks ranks"
  run $ranks train "$work/config.yaml" --set model.width=32 --set run.steps=99
  refused "step-00000012"
done

# Either refused, or the later checkpoints do not take over at the next start.
what="going back by path in the same run directory"
cp -r "$work/run" "$work/copy"
run 1 train "$work/config.yaml" --resume "$(step_path "$work/run" 4)" --set run.steps=6
if [ "$status" = 1 ]; then
  refused "step-00000012"
else
  expect_status 0
  run 1 train "$work/config.yaml" --set run.steps=8
  expect_text "$work/err" "resumed at step 6"
  expect_steps "$work/run" 8
fi
rm -rf "$work/run"
mv "$work/copy" "$work/run"

mv "$work/data" "$work/moved"
"$MAKE_SET" directory="$work/data/train" samples=45 first=100
cp -r "$work/moved/validation" "$work/data/validation"
for ranks in 1 2; do
  what="another training set, $ranks ranks"
  run $ranks train "$work/config.yaml" --set run.steps=99
  refused "training shards" "step-00000012"
done
rm -rf "$work/data"
mv "$work/moved" "$work/data"

what="a second process in the same run directory"
rm -rf "$work/run"
WORK=$work/first
mkdir "$WORK"
timeout 60 sh "$work/rank.sh" train "$work/config.yaml" --set run.steps=100000 >"$WORK/out" 2>"$WORK/err" &
rm -f "$work/status"
until_true 20 has_lines "$work/run/metrics.jsonl" 10 || fail "expected a first run to be under way"
WORK=$work
for ranks in 1 2; do
  run_beside $ranks train "$work/config.yaml"
  expect_status 1
  expect_error "another process is running in $work/run"
done
kill -TERM "$(cat "$work/first/pid.0")"
wait
expect_text "$work/first/err" "the state is saved"
finish
