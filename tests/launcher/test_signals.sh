# A request to stop: the state is saved, the exit status is 75, and the next start comes to the result of a run
# that was never stopped.
. "$(dirname "$0")/lib.sh"

last=300
[ -z "${SANITIZED:-}" ] || last=120 # steps take much longer
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
# of what the ranks print, so they must not print much. Its own exit status is then 1. On a machine with much other
# work a second may be too short: of three attempts one must be in time.
what="SIGTERM to mpirun"
saved() {
  grep -q "the state is saved" "$work/run/log.txt"
}
for attempt in 1 2 3; do
  rm -rf "$work/run"
  start 2 train "$work/config.yaml" --set run.steps=100000 --set run.log=1000 --set parallel.experts=2
  until_true 30 has_lines "$work/run/metrics.jsonl" 40 || fail "expected 40 steps"
  kill -TERM "$(pid mpirun)"
  wait_job
  [ "$status" != 0 ] && [ "$status" != hung ] || fail "expected mpirun to fail, got status $status"
  # the ranks may live a little longer than mpirun
  began=$(date +%s)
  until grep -q 'done: ' "$work/run/log.txt" || [ $(($(date +%s) - began)) -gt 4 ]; do sleep 0.1; done
  saved && break
done
expect_text "$work/run/log.txt" "stopped on request at step" "the state is saved"
at=$(sed -n 's/.*stopped on request at step \([0-9]*\).*/\1/p' "$work/run/log.txt")
run 2 train "$work/config.yaml" --set run.steps=$((at + 3)) --set parallel.experts=2
expect_status 0
expect_text "$work/err" "resumed at step $at"
expect_steps "$work/run" $((at + 3))

# ---- in each phase: start-up, saving, evaluation ----
#
# Before the command catches them, a signal ends it as it ends any process; from then on the status is 75 and a new
# start comes to the end of a run that was not stopped. What is stopped is what lasts: reading the set
# that is to be measured and saving are slow, there is much to evaluate.

"$MAKE_SET" directory="$work/large/train" samples=6000 shards=1 rows=40 image=64 text=64
"$MAKE_SET" directory="$work/large/validation" samples=40 shards=1 first=5000 image=64 text=64
"$MAKE_SET" directory="$work/held-out/validation" samples=3000 shards=1 first=5000
cp -r "$work/data/train" "$work/held-out/train"
settings_of() { # phase
  case $1 in
    start-up)
      echo "--set data.path=$work/large --set run.steps=4 --set data.modalities.image.positions=rope" \
        "--set data.modalities.text.positions=rope"
      ;;
    saving) echo "--set run.steps=30 --set checkpoint.interval=10" ;;
    evaluation)
      echo "--set data.path=$work/held-out --set run.steps=12 --set evaluate.interval=4 --set evaluate.at_end=true" \
        "--set evaluate.batch=2 --set checkpoint.interval=4"
      ;;
  esac
}

catches() { # rank signal-number: it has a handler
  mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$(pid "$1")/status" 2>/dev/null)
  [ -n "$mask" ] && [ $((0x$mask >> ($2 - 1) & 1)) = 1 ]
}

starting() { # every rank would take a request, and none has made a step
  for rank in $(seq 0 $((ranks - 1))); do
    [ -s "$work/pid.$rank" ] && catches "$rank" 15 && catches "$rank" 10 || return 1
  done
  no_step
}

no_step() {
  [ ! -s "$work/run/metrics.jsonl" ]
}

saving() { # a save is being written
  [ -n "$(find "$work/run/checkpoints" -name 'step-*.tmp' 2>/dev/null)" ]
}

evaluating() { # the step before an evaluation is in the metrics, the evaluation is not
  [ "$(steps_of "$work/run" 2>/dev/null | wc -w)" -ge "$steps" ] && [ "$(evaluations_of "$work/run" | wc -w)" -lt $((steps / 4)) ]
}

# Sends the signal to one rank while the phase lasts: seen before and after.
interrupt() { # phase signal rank
  case $1 in start-up) seen=starting ;; saving) seen=saving ;; evaluation) seen=evaluating ;; esac
  until_true 30 $seen || fail "expected the phase $1 to be met"
  sleep "${delay:-0}"
  kill -"$2" "$(pid "$3")"
  [ "$1" != start-up ] || seen=no_step # those that were asked may be gone
  $seen || fail "expected the phase $1 to last until the signal was sent"
}

expect_stopped() {
  wait_job
  unset ANTIPHON_FAULT_FILE
  expect_status 75
  grep -q 'error: ' "$work/err" && fail "expected no error message on a stop that was asked for"
  expect_text "$work/err" "stopped on request"
}

expect_same_end() { # ranks
  run "$1" train "$work/config.yaml" $sets
  expect_status 0
  expect_steps "$work/run" "$last"
  metrics "$work/straight" "$work/expected"
  metrics "$work/run" "$work/got"
  expect_same_file "metrics" "$work/expected" "$work/got"
  expect_equal "evaluations" "$(evaluations_of "$work/straight")" "$(evaluations_of "$work/run")"
  expect_equal "content" "$(content "$(step_path "$work/straight" "$last")")" \
    "$(content "$(step_path "$work/run" "$last")")"
}

straight() { # phase ranks: the run that nobody stops
  ranks=$2
  sets="$(settings_of "$1") --set parallel.experts=$ranks"
  last=$(echo "$sets" | sed 's/.*run.steps=\([0-9]*\).*/\1/')
  what="$1, the undisturbed run, $ranks ranks"
  rm -rf "$work/straight"
  run "$ranks" train "$work/config.yaml" $sets --set run.directory="$work/straight"
  expect_status 0
}

begin() { # phase signal
  what="SIG$2 in $1${delay:+, $delay s later}, $ranks ranks"
  rm -rf "$work/run"
  start "$ranks" train "$work/config.yaml" $sets
}

for ranks in 1 2; do
  straight start-up $ranks
  # at once, while the ranks find one another, and while the latents are measured
  for case in "TERM 0" "USR1 0" "TERM 0.03" "USR1 0.03" "TERM 0.5" "USR1 0.5"; do
    signal=${case% *} delay=${case#* }
    ANTIPHON_FAULT_FILE=1:sleep=10:large/train
    export ANTIPHON_FAULT_FILE
    begin start-up "$signal"
    interrupt start-up "$signal" $((ranks - 1))
    expect_stopped
    [ "$delay" != 0.5 ] || expect_same_end $ranks
  done
  delay=
  straight saving $ranks
  for signal in TERM USR1; do
    ANTIPHON_FAULT_FILE=1:sleep=4:.tmp
    export ANTIPHON_FAULT_FILE
    begin saving $signal
    interrupt saving $signal $((ranks - 1))
    at=$(ls "$work/run/checkpoints" | sed -n 's/^\(step-[0-9]*\)[.]tmp$/\1/p')
    expect_stopped
    [ -e "$work/run/checkpoints/$at/manifest.json" ] || fail "expected the save under way ($at) to be finished"
    run 1 check "$work/run"
    expect_status 0
    expect_same_end $ranks
  done
  straight evaluation $ranks
  for steps in 4 12; do # the last one is that at the end of the run
    for signal in TERM USR1; do
      begin evaluation $signal
      interrupt evaluation $signal $((ranks - 1))
      wait_job
      expect_status 75
      grep -q 'error: ' "$work/err" && fail "expected no error message on a stop that was asked for"
      expect_same_end $ranks
      expect_text "$work/err" "resumed at step $steps"
    done
  done
done
finish
