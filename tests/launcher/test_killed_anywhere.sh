# Any one of four ranks is killed at a random instant, from the start of its process to its end: the others end soon,
# that rank and no other is named, and the same command then reaches the bits of a run that nobody disturbed.
# KILLS: how many instants (32 unless set); SEED: of their choice; JOBS: how many jobs at a time (3).
# Most of the time of a kill is mpirun's, which waits before it ends what is left, so jobs run beside one another.
. "$(dirname "$0")/lib.sh"

kills=${KILLS:-32} seed=${SEED:-1} jobs=${JOBS:-3}
last=54 # saved every 10 steps, evaluated every 7: never both at once
sets="--set run.steps=$last --set checkpoint.interval=10 --set checkpoint.keep=2 --set evaluate.interval=7
  --set evaluate.at_end=true --set checkpoint.buffers=2 --set parallel.experts=2 --set run.deadline=5 --set run.directory=$work/run"
slow=1:sleep=1:.tmp # saves take as long as several steps

milliseconds() { date +%s%3N; }

# ---- where the job is ----

# The phase, by what lies in the run directory: start-up, save, evaluation, step, end
phase() {
  if [ ! -s "$work/run/metrics.jsonl" ]; then
    echo start-up
  elif [ -n "$(find "$work/run/checkpoints" -name 'step-*.tmp' 2>/dev/null)" ]; then
    echo save
  else
    tail -n 1 "$work/run/metrics.jsonl" | awk -F '[:,]' -v last=$last '
      /"evaluation"/ {print ($2 == last ? "end" : "step"); next}
      {print ($2 % 7 == 0 || $2 == last ? "evaluation" : "step")}'
  fi
}

in_phase() { # phase: a rank lives and is there
  [ -f "$work/pid.0" ] && [ "$(phase)" = "$1" ]
}

# ---- one kill ----

alone() { # no process of the job is left
  for each in 0 1 2 3; do
    [ -f "$work/pid.$each" ] && [ -e "/proc/$(pid $each)/exe" ] && return 1
  done
  return 0
}

# Which rank died, in mpirun's words or in our own
named() {
  sed -n -e 's/.*that process rank \([0-9]*\) with PID.*/\1/p' -e 's/.*rank \([0-9]*\) is missing.*/\1/p' "$work/err" |
    sort -u | tr '\n' ' '
}

# Sets fell: the phase, if it was the same before and after, or "between"; "before" and "after" the job's life.
kill_rank() { # rank
  fell=$(phase)
  [ -f "$work/status" ] && fell=after && return 0
  kill -KILL "$(pid "$1")" 2>/dev/null || { fell=after && return 0; }
  [ "$(phase)" = "$fell" ] || fell=between
}

expect_ended() { # rank
  then=$(milliseconds)
  wait_job
  took=$(($(milliseconds) - then))
  if [ "$status" = 0 ]; then
    fell=after # it had already left the job
    return 0
  fi
  # A process that dies while it connects to mpirun can leave Open MPI 4 waiting for ever, or end the job without a
  # word, before anything of ours runs: these are counted, and may be few.
  if [ "$fell" = start-up ] && ! says 'expert group'; then
    [ "$status" = hung ] && says 'PMIX ERROR: UNREACHABLE' && fell=connecting && return 0
    [ "$status" != hung ] && [ -z "$(named)" ] && fell=connecting && return 0
  fi
  [ "$status" != hung ] && [ $took -lt 8000 ] || fail "expected the others to end within 8 s, they took $took ms"
  expect_equal "ranks named" "$1 " "$(named)"
  alone || fail "expected no process to be left"
}

expect_same_end() {
  newest=$(find "$work/run/checkpoints" -path '*/step-????????/manifest.json' 2>/dev/null | sort | tail -n 1)
  run 4 train "$CONFIG" $sets
  expect_status 0
  [ -z "$newest" ] || expect_text "$work/err" "resumed at step $(echo "$newest" | sed 's/.*step-0*\([0-9]*\).*/\1/')"
  expect_equal "content" "$WHOLE" "$(content "$(step_path "$work/run" $last)")"
  metrics "$work/run" "$work/got"
  expect_same_file "metrics" "$EXPECTED" "$work/got"
}

# Makes the phase that is aimed at last, on machines of any speed: sets ANTIPHON_FAULT_FILE and more.
slow_down() { # milliseconds-or-phase
  more=
  case $1 in
    step) # each one waits for its line in the metrics, and no save comes between
      ANTIPHON_FAULT_FILE=1:sleep=20:metrics.jsonl
      more="--set checkpoint.interval=40"
      ;;
    evaluation) ANTIPHON_FAULT_FILE=1:sleep=50:validation/ ;;
    *) ANTIPHON_FAULT_FILE=$slow ;;
  esac
}

# Kills a rank so many milliseconds after its start, or as soon as the job is in a phase.
one_kill() { # rank milliseconds-or-phase
  what="rank $1 killed at $2"
  rm -rf "$work/run"
  slow_down "$2"
  export ANTIPHON_FAULT_FILE
  start 4 train "$CONFIG" $sets $more
  unset ANTIPHON_FAULT_FILE
  until_true 20 test -s "$work/pid.$1"
  case $2 in
    [0-9]*) sleep "$(awk -v ms="$2" 'BEGIN {print ms / 1000}')" ;;
    *) until_true 20 in_phase "$2" ;;
  esac
  kill_rank "$1"
  what="$what ($fell)"
  expect_ended "$1"
  expect_same_end
}

# A share of the instants, by a process of its own: its lines are those with this remainder.
if [ -n "${SHARE:-}" ]; then
  limit=30
  while read -r rank when <&3; do
    one_kill "$rank" "$when"
    # no run is as long as another one: what came too late comes earlier
    case $when,$fell in [0-9][0-9]*,after) one_kill "$rank" $((when / 2)) ;; esac
    echo "$fell" >>"$FELL"
  done 3<"$SHARE"
  finish
fi

# ---- all of them ----

prepare samples=45 absent=5
"$MAKE_SET" directory="$work/data/validation" samples=800 shards=1 first=5000
what="the undisturbed run"
ANTIPHON_FAULT_FILE=$slow
export ANTIPHON_FAULT_FILE
start 4 train "$work/config.yaml" $sets --set run.directory="$work/straight"
unset ANTIPHON_FAULT_FILE
until_true 20 test -s "$work/pid.0"
then=$(milliseconds)
wait_job
length=$(($(milliseconds) - then))
expect_status 0
WHOLE=$(content "$(step_path "$work/straight" $last)")
metrics "$work/straight" "$work/expected"
CONFIG=$work/config.yaml EXPECTED=$work/expected FELL=$work/fell
export WHOLE CONFIG EXPECTED FELL

kill_them() { # instants: rank and when, one a line
  workers=
  for job in $(seq 0 $((jobs - 1))); do
    awk -v job="$job" -v jobs="$jobs" 'NR % jobs == job' "$1" >"$1.$job"
    SHARE=$1.$job sh "$0" &
    workers="$workers $!"
  done
  for worker in $workers; do wait "$worker" || failures=$((failures + 1)); done
}
trap 'kill $workers 2>/dev/null; clean_up' EXIT

awk -v n="$kills" -v seed="$seed" -v length_="$length" \
  'BEGIN {srand(seed); for (i = 0; i < n; i++) print int(4 * rand()), int(length_ * rand())}' >"$work/instants"
: >"$work/fell"
kill_them "$work/instants"

count() { grep -c "^$1\$" "$work/fell"; }
what="phases"
for try in 1 2 3; do # what the instants have missed is aimed at
  for each in start-up step save evaluation; do
    [ "$(count $each)" -gt 0 ] || echo "$((try % 4)) $each"
  done >"$work/aimed"
  [ ! -s "$work/aimed" ] || kill_them "$work/aimed"
done
note "$kills instants over $length ms: $(sort "$work/fell" | uniq -c | awk '{printf "%s %s, ", $1, $2}')$(lines "$work/fell") in all"
for each in start-up step save evaluation; do
  [ "$(count $each)" -gt 0 ] || fail "expected a kill in the phase $each"
done
[ "$(lines "$work/fell")" -ge "$kills" ] || fail "expected $kills kills"
[ "$(count connecting)" -le $((1 + kills / 10)) ] || fail "mpirun lost the job $(count connecting) times"
[ "$(count after)" -lt $((kills / 2)) ] || fail "expected most instants to hit a living rank"
finish
