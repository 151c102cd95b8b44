# Saving that takes much longer than a step: what is stored is the state of its step, saves that fall due meanwhile are
# put off and not lost, and a rank that stops answering while it saves is missed by the others within the deadline.
. "$(dirname "$0")/lib.sh"

last=64
prepare samples=45
sets="--set run.steps=$last --set checkpoint.keep=200 --set parallel.experts=2
  --set optimizer.batch=1024 --set model.layers=1 --set model.moe.experts=2" # a step is not much shorter than a save

slowly() { # milliseconds an operation on files that are being saved takes; then as for start
  ANTIPHON_FAULT_FILE=1:sleep=$1:.tmp
  export ANTIPHON_FAULT_FILE
  shift
  start "$@"
  unset ANTIPHON_FAULT_FILE
}

steps_saved() { # run-directory: the steps whose checkpoints are there
  ls "$1/checkpoints" | sed -n 's/^step-0*\([0-9]*\)$/\1/p'
}

# ---- saves that are put off ----

what="every step saved, each waited for"
run 2 train "$work/config.yaml" $sets --set checkpoint.interval=1 --set run.directory="$work/waited"
expect_status 0
expect_equal "checkpoints" $last "$(steps_saved "$work/waited" | wc -l)"

# A save is some 60 operations: of so many milliseconds each that it takes as long as about 8 steps
pause=$(sed -n 's/.*"seconds":{"step":\([^,]*\),.*/\1/p' "$work/waited/metrics.jsonl" |
  awk '{sum += $1} END {ms = 8 * 1000 * sum / NR / 60; print (ms > 1 ? int(ms + 0.5) : 1)}')
late_saves() { # copies; the first saves, which are not put off
  rm -rf "$work/run"
  what="saves due every 4 steps, by a slow writer ($pause ms an operation), $1 copies of the state"
  slowly "$pause" 2 train "$work/config.yaml" $sets --set checkpoint.interval=4 --set checkpoint.busy=delay \
    --set checkpoint.buffers="$1"
  wait_job
  expect_status 0
  expect_steps "$work/run" $last
  saved=$(steps_saved "$work/run")
  count=$(echo "$saved" | wc -l)
  note "$what: $count checkpoints of $((last / 4)) that were due: $(echo "$saved" | tr '\n' ' ')"
  [ "$count" -ge 3 ] && [ "$count" -lt $((last / 4)) ] ||
    fail "expected some of the saves to be put off, got $count checkpoints"
  expect_equal "those that found a copy free, and the last" "$2 $last" \
    "$(echo "$saved" | sed -n "1,$1p;\$p" | tr '\n' ' ' | sed 's/ $//')"
  for step in $saved; do
    expect_equal "content of step $step" "$(content "$(step_path "$work/waited" "$step")")" \
      "$(content "$(step_path "$work/run" "$step")")"
  done
  run 1 check "$work/run"
  expect_status 0
}
late_saves 1 "4"
echo "$saved" | awk '$1 % 4 != 0 {found = 1} END {exit !found}' ||
  fail "expected a save that was put off to come as soon as the one before had ended, not at the next fourth step"
late_saves 2 "4 8" # the second begins on time, while the first is written; a third is put off

# ---- asked to stop while two saves are pending ----

two_pending() {
  [ -d "$(step_path "$work/run" 4).tmp" ] && [ -d "$(step_path "$work/run" 8).tmp" ]
}

what="asked to stop while two saves are pending"
rm -rf "$work/run"
slowly $((5 * pause)) 2 train "$work/config.yaml" $sets --set checkpoint.interval=4 --set checkpoint.buffers=2
until_true 60 two_pending || fail "expected the saves of steps 4 and 8 to be pending at once"
kill -TERM "$(pid 0)"
wait_job
expect_status 75
saved=$(steps_saved "$work/run")
stopped=$(echo "$saved" | tail -n 1)
note "stopped at step $stopped; checkpoints: $(echo "$saved" | tr '\n' ' ')"
[ "$stopped" -gt 8 ] || fail "expected the step at which it stopped to be saved behind the two"
expect_equal "the two" "4 8" "$(echo "$saved" | sed -n '1,2p' | tr '\n' ' ' | sed 's/ $//')"
for step in 4 8 "$stopped"; do
  expect_equal "content of step $step" "$(content "$(step_path "$work/waited" "$step")")" \
    "$(content "$(step_path "$work/run" "$step")")"
done

# ---- a rank that stops while it saves ----

last=8
sets="--set run.steps=$last --set parallel.experts=2 --set run.deadline=3"
what="the undisturbed run"
run 2 train "$work/config.yaml" $sets --set run.directory="$work/straight"
whole=$(content "$(step_path "$work/straight" $last)")

saving_the_last() { # all steps are done, the last save is being written
  has_lines "$work/run/metrics.jsonl" $last && [ -d "$(step_path "$work/run" $last).tmp" ]
}

for rank in 0 1; do
  what="rank $rank stopped in a save"
  other=$((1 - rank))
  rm -rf "$work/run"
  slowly 10 2 train "$work/config.yaml" $sets
  until_true 30 saving_the_last || fail "expected the last save to begin"
  kill -STOP "$(pid $rank)"
  then=$(date +%s)
  [ -d "$(step_path "$work/run" $last).tmp" ] || fail "expected the save to be under way when the rank was stopped"
  wait_job
  took=$(($(date +%s) - then))
  [ "$status" != 0 ] && [ "$status" != hung ] || fail "expected the job to fail, got status $status"
  [ $took -ge 2 ] && [ $took -le 15 ] || fail "expected the deadline of 3 s to end the job, it took $took s"
  expect_error "deadline of 3 s" "rank $rank is missing" "checkpoint"
  expect_text "$work/run/error.$other.json" '"ERR_TIMEOUT"' "rank $rank is missing" '"checkpoint"'
  [ ! -e "$(step_path "$work/run" $last)" ] || fail "a checkpoint without one rank's part was published"
  run 2 train "$work/config.yaml" $sets
  expect_status 0
  expect_equal "content" "$whole" "$(content "$(step_path "$work/run" $last)")"
done

# A save that takes longer than the deadline, but gets on, is waited for.
what="a save slower than the deadline"
rm -rf "$work/run"
slowly 60 2 train "$work/config.yaml" $sets
wait_job
expect_status 0
[ "$seconds" -ge 4 ] || fail "expected the save to take longer than the deadline of 3 s, the job took $seconds s"
expect_equal "content" "$whole" "$(content "$(step_path "$work/run" $last)")"
finish
