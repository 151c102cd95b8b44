# A rank is killed or stops answering: the others end soon, say who is missing, and a new start goes on.
. "$(dirname "$0")/lib.sh"

sets="--set run.steps=600 --set checkpoint.interval=20 --set parallel.experts=2 --set run.deadline=3"
prepare samples=45
run 2 train "$work/config.yaml" $sets --set run.directory="$work/straight"
expect_status 0
whole=$(content "$(step_path "$work/straight" 600)")

goes_on() {
  run 2 train "$work/config.yaml" $sets
  expect_status 0
  expect_text "$work/err" "resumed at step"
  expect_steps "$work/run" 600
  expect_equal "content" "$whole" "$(content "$(step_path "$work/run" 600)")"
}

begin_job() {
  rm -rf "$work/run"
  start 2 train "$work/config.yaml" $sets
  until_true 30 test -e "$work/run/checkpoints/step-00000040" || fail "expected a checkpoint of step 40"
}

ended_within() { # seconds since $then
  took=$(($(date +%s) - then))
  [ $took -le "$1" ] || fail "expected the job to end within $1 s, it took $took s"
  [ "$status" != 0 ] && [ "$status" != hung ] || fail "expected the job to fail, got status $status"
  for each in 0 1; do
    # gone, or ended and not yet taken note of by its parent: such a process has no file
    [ ! -e "/proc/$(pid $each)/exe" ] || fail "expected the process of rank $each to have ended"
  done
}

for rank in 0 1; do
  what="rank $rank killed"
  begin_job
  then=$(date +%s)
  kill -KILL "$(pid $rank)"
  wait_job
  ended_within 8
  goes_on
done

for rank in 0 1; do
  what="rank $rank stopped"
  begin_job
  then=$(date +%s)
  kill -STOP "$(pid $rank)"
  wait_job
  ended_within 12
  other=$((1 - rank))
  expect_text "$work/err" "deadline of 3 s" "rank $rank is missing" "step "
  [ -e "$work/run/error.$other.json" ] || fail "expected $work/run/error.$other.json"
  expect_text "$work/run/error.$other.json" '"ERR_TIMEOUT"' "rank $rank is missing" '"step"' '"phase"'
  [ "$(grep -c 'error: ' "$work/err")" = 1 ] || fail "expected one error message"
  goes_on
done

what="a rank stopped for less than the deadline"
begin_job
kill -STOP "$(pid 1)"
sleep 1
kill -CONT "$(pid 1)"
wait_job
expect_status 0
expect_equal "content" "$whole" "$(content "$(step_path "$work/run" 600)")"
finish
