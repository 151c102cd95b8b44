# Any one of four ranks is killed at a random instant, from the start of the job to its end: the others end soon, the
# killed rank is named, and the same command then reaches the bits of a run that nobody disturbed.
# KILLS: how many instants (12 unless set); SEED: of their choice.
. "$(dirname "$0")/lib.sh"

kills=${KILLS:-12} seed=${SEED:-1}
last=60
sets="--set run.steps=$last --set checkpoint.interval=5 --set checkpoint.keep=2 --set evaluate.interval=15
  --set evaluate.at_end=true --set parallel.experts=2 --set run.deadline=5"
prepare samples=45 absent=5
what="the undisturbed run"
milliseconds() { date +%s%3N; }
then=$(milliseconds)
run 4 train "$work/config.yaml" $sets --set run.directory="$work/straight"
length=$(($(milliseconds) - then))
expect_status 0
whole=$(content "$(step_path "$work/straight" $last)")
metrics "$work/straight" "$work/expected"

# instants: rank and milliseconds after the start, one a line
awk -v n="$kills" -v seed="$seed" -v length_="$length" \
  'BEGIN {srand(seed); for (i = 0; i < n; i++) print int(4 * rand()), int(length_ * rand())}' >"$work/instants"

alone() { # no process of the job is left
  for each in 0 1 2 3; do
    [ -f "$work/pid.$each" ] && [ -e "/proc/$(pid $each)/exe" ] && return 1
  done
  return 0
}

early=0 done_before=0 resumed=0
while read -r rank after; do
  what="rank $rank killed after $after ms (of $length)"
  rm -rf "$work/run"
  start 4 train "$work/config.yaml" $sets
  sleep "$(awk -v ms="$after" 'BEGIN {print ms / 1000}')"
  killed=
  if [ -f "$work/pid.$rank" ] && [ ! -f "$work/status" ]; then
    kill -KILL "$(pid "$rank")" 2>/dev/null && killed=yes
  fi
  then=$(milliseconds)
  wait_job
  took=$(($(milliseconds) - then))
  if [ -z "$killed" ]; then
    early=$((early + 1)) # the rank had not begun, or the job was over
  elif [ "$status" = 0 ]; then
    done_before=$((done_before + 1)) # it had already left the job
  else
    [ "$status" != hung ] && [ $took -lt 8000 ] || fail "expected the others to end within 8 s, they took $took ms"
    grep -q "rank $rank" "$work/err" || fail "expected rank $rank to be named"
    alone || fail "expected no process to be left"
  fi
  run 4 train "$work/config.yaml" $sets
  expect_status 0
  grep -q "resumed at step" "$work/err" && resumed=$((resumed + 1))
  expect_equal "content" "$whole" "$(content "$(step_path "$work/run" $last)")"
  metrics "$work/run" "$work/got"
  expect_same_file "metrics" "$work/expected" "$work/got"
done <"$work/instants"
note "$kills instants over $length ms: $early outside the job's life, $done_before after the rank's end, $resumed resumed"
what="the choice of instants"
[ $((early + done_before)) -lt $((kills / 2)) ] || fail "expected most instants to hit a living rank"
finish
