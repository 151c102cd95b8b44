# A process that ends at any instant of a save, as if killed: the next start goes on from a sound checkpoint
# and comes to the same result.
. "$(dirname "$0")/lib.sh"

prepare samples=45
sets="--set run.steps=16 --set checkpoint.interval=4 --set checkpoint.keep=2"
run 1 train "$work/config.yaml" $sets
whole=$(content "$(step_path "$work/run" 16)")
expect_status 0

goes_on() { # RANKS [--set ...]
  ranks=$1
  shift
  run "$ranks" train "$work/config.yaml" $sets "$@"
  expect_status 0
  expect_steps "$work/run" 16
  [ -n "$*" ] || expect_equal "content" "$whole" "$(content "$(step_path "$work/run" 16)")"
  "$ANTIPHON" check "$work/run" >"$work/check" 2>&1 || fail "expected sound checkpoints: $(tail -1 "$work/check")"
  left=$(ls "$work/run/checkpoints" | grep -v '^step-[0-9]*$')
  expect_equal "what is left over" "" "$left"
}

# At operations on files of checkpoints: while the first is written and while the last is published and an old one
# removed, densely
was_ended() {
  [ "$status" = 137 ]
}
what="counting the operations on checkpoints"
operations exit checkpoints/step- was_ended 1 train "$work/config.yaml" $sets
note "$what: $many"
[ "$many" -ge 40 ] || fail "expected at least 40 operations, got $many"
for operation in $(chosen "$many" 6 24 24); do
  what="ended at operation $operation of $many"
  rm -rf "$work/run"
  fault "$operation" exit checkpoints/step- 1 train "$work/config.yaml" $sets
  expect_status 137
  goes_on 1
done

for operation in 2 6; do
  what="two ranks, one ends at operation $operation"
  rm -rf "$work/run"
  fault $operation exit checkpoints/step-00000008 2 train "$work/config.yaml" $sets --set parallel.experts=2
  [ "$status" != 0 ] && [ "$status" != hung ] || fail "expected the job to fail, got status $status"
  goes_on 2 --set parallel.experts=2
done

# kill -9 at any time: every step is saved, so most of the time is that of saves.
sets="--set run.steps=1500 --set checkpoint.interval=1 --set checkpoint.keep=2 --set optimizer.schedule=constant"
rm -rf "$work/run"
try=1
while [ $try -le 10 ]; do
  what="kill -9, try $try"
  reached=$(lines "$work/run/metrics.jsonl")
  start 1 train "$work/config.yaml" $sets
  until_true 30 has_lines "$work/run/metrics.jsonl" $((reached + 10 + try * 3)) ||
    fail "expected step $((reached + 10 + try * 3)) to be reached"
  sleep 0.0$try
  kill -KILL "$(pid 0)" 2>/dev/null
  wait_job
  expect_status 137
  [ $try = 1 ] || expect_text "$work/err" "resumed at step"
  says 'passed over' && fail "expected the newest checkpoint to be sound"
  try=$((try + 1))
done
what="after ten kills"
sets="--set run.steps=1600 --set optimizer.schedule=constant --set checkpoint.interval=500"
run 1 train "$work/config.yaml" $sets
expect_status 0
expect_steps "$work/run" 1600
run 1 train "$work/config.yaml" $sets --set run.directory="$work/straight"
expect_equal "content" "$(content "$(step_path "$work/straight" 1600)")" "$(content "$(step_path "$work/run" 1600)")"
finish
