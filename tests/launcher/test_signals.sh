# A request to stop: the state is saved, the exit status is 75, and the next start comes to the result of a run
# that was never stopped.
. "$(dirname "$0")/lib.sh"

last=600
sets="--set run.steps=$last"
prepare samples=45
run 1 train "$work/config.yaml" $sets --set run.directory="$work/straight1"
expect_status 0
run 2 train "$work/config.yaml" $sets --set parallel.experts=2 --set run.directory="$work/straight2"
expect_status 0

# goes_on RANKS [--set ...]: to the same end
goes_on() {
  ranks=$1
  shift
  expect_text "$work/err" "stopped on request at step" "the state is saved"
  at=$(sed -n 's/.*stopped on request at step \([0-9]*\).*/\1/p' "$work/err")
  [ -e "$(step_path "$work/run" "$at")/manifest.json" ] || fail "expected a checkpoint of step $at"
  run "$ranks" train "$work/config.yaml" $sets "$@"
  expect_status 0
  expect_text "$work/err" "resumed at step $at"
  expect_steps "$work/run" $last
  metrics "$work/run" "$work/got"
  metrics "$work/straight$ranks" "$work/expected"
  [ "$same" = content ] || expect_same_file "metrics" "$work/expected" "$work/got"
  expect_equal "content" "$(content "$(step_path "$work/straight$ranks" $last)")" \
    "$(content "$(step_path "$work/run" $last)")"
}

# ---- in training ----

same=metrics
for signal in TERM USR1 INT; do
  what="SIG$signal in training, 1 rank"
  rm -rf "$work/run"
  start 1 train "$work/config.yaml" $sets
  until_true 30 has_lines "$work/run/metrics.jsonl" 40 || fail "expected 40 steps"
  kill -$signal "$(pid 0)"
  wait_job
  expect_status 75
  goes_on 1
done

# Each rank, one rank, or mpirun, which passes USR1 on and returns the ranks' status.
for case in "TERM 0 1" "USR1 1" "INT 0" "USR1 mpirun"; do
  what="signal and whom: $case, 2 ranks"
  rm -rf "$work/run"
  start 2 train "$work/config.yaml" $sets --set parallel.experts=2
  until_true 30 has_lines "$work/run/metrics.jsonl" 40 || fail "expected 40 steps"
  signal=${case%% *}
  for target in ${case#* }; do kill -"$signal" "$(pid "$target")"; done
  wait_job
  expect_status 75
  goes_on 2 --set parallel.experts=2
done

# mpirun told to end by SIGTERM passes it on after a second, and SIGKILL a second later; meanwhile it reads nothing
# of what the ranks print, so they must not print much. Its own exit status is then 1.
what="SIGTERM to mpirun"
rm -rf "$work/run"
start 2 train "$work/config.yaml" --set run.steps=100000 --set run.log=1000 --set parallel.experts=2
until_true 30 has_lines "$work/run/metrics.jsonl" 40 || fail "expected 40 steps"
kill -TERM "$(pid mpirun)"
wait_job
[ "$status" != 0 ] && [ "$status" != hung ] || fail "expected mpirun to fail, got status $status"
# the ranks may live a little longer than mpirun
began=$(date +%s)
until grep -q 'done: ' "$work/run/log.txt" || [ $(($(date +%s) - began)) -gt 20 ]; do sleep 0.1; done
expect_text "$work/run/log.txt" "stopped on request at step" "the state is saved"
at=$(sed -n 's/.*stopped on request at step \([0-9]*\).*/\1/p' "$work/run/log.txt")
run 2 train "$work/config.yaml" --set run.steps=$((at + 3)) --set parallel.experts=2
expect_status 0
expect_text "$work/err" "resumed at step $at"
expect_steps "$work/run" $((at + 3))

# ---- in start-up: at once, and while the latents are measured ----

for delay in 0.005 0.02 0.04 0.06 0.1; do
  what="SIGTERM $delay s after the start"
  rm -rf "$work/run"
  start 1 train "$work/config.yaml" $sets
  until_true 10 test -f "$work/pid.0"
  sleep $delay
  kill -TERM "$(pid 0)"
  wait_job
  # 143: it was still the shell that starts the command, or the command had not begun.
  if [ "$status" != 143 ]; then
    expect_status 75
    grep -q 'error: ' "$work/err" && fail "expected no error message on a stop that was asked for"
    run 1 train "$work/config.yaml" $sets
    expect_status 0
    expect_steps "$work/run" $last
    expect_equal "content" "$(content "$(step_path "$work/straight1" $last)")" \
      "$(content "$(step_path "$work/run" $last)")"
  fi
done

what="SIGTERM in start-up, 2 ranks"
rm -rf "$work/run"
"$MAKE_SET" directory="$work/large/train" samples=6000 shards=1 rows=40 image=64 text=64
cp -r "$work/data/validation" "$work/large/validation"
large="--set data.path=$work/large --set parallel.experts=2 --set data.modalities.image.positions=rope
  --set data.modalities.text.positions=rope --set run.steps=4"
start 2 train "$work/config.yaml" $large
until_true 30 test -e "$work/run/log.txt" || fail "expected the run directory to be taken"
kill -TERM "$(pid 1)"
wait_job
expect_status 75
grep -q 'error: ' "$work/err" && fail "expected no error message on a stop that was asked for"
run 2 train "$work/config.yaml" $large
expect_status 0
expect_steps "$work/run" 4

# ---- while saving ----

what="SIGTERM while saving"
rm -rf "$work/run"
start 1 train "$work/config.yaml" $sets --set checkpoint.interval=1 --set checkpoint.keep=3
until_true 30 has_lines "$work/run/metrics.jsonl" 20 || fail "expected 20 steps"
kill -TERM "$(pid 0)"
wait_job
expect_status 75
goes_on 1

# ---- in evaluation ----

"$MAKE_SET" directory="$work/data/validation" samples=8000 shards=1 first=5000
sets="--set run.steps=12 --set evaluate.interval=4 --set evaluate.at_end=true --set evaluate.batch=2
  --set checkpoint.interval=4"
for ranks in 1 2; do
  last=12
  rm -rf "$work/straight$ranks"
  run $ranks train "$work/config.yaml" $sets --set run.directory="$work/straight$ranks" --set parallel.experts=$ranks
  expect_status 0
  for steps in 4 12; do
    what="SIGTERM in the evaluation of step $steps, $ranks ranks"
    rm -rf "$work/run"
    start $ranks train "$work/config.yaml" $sets --set parallel.experts=$ranks
    until_true 30 has_lines "$work/run/metrics.jsonl" $((steps + steps / 4 - 1)) || fail "expected $steps steps"
    kill -TERM "$(pid $((ranks - 1)))"
    wait_job
    expect_status 75
    grep -q 'error: ' "$work/err" && fail "expected no error message on a stop that was asked for"
    run $ranks train "$work/config.yaml" $sets --set parallel.experts=$ranks
    expect_status 0
    expect_text "$work/err" "resumed at step $steps"
    expect_steps "$work/run" $last
    expect_equal "evaluations" "$(evaluations_of "$work/straight$ranks")" "$(evaluations_of "$work/run")"
    metrics "$work/straight$ranks" "$work/expected"
    metrics "$work/run" "$work/got"
    expect_same_file "metrics" "$work/expected" "$work/got"
    expect_equal "content" "$(content "$(step_path "$work/straight$ranks" $last)")" \
      "$(content "$(step_path "$work/run" $last)")"
  done
done
finish
