# The clock of the day jumps by days while a job runs: no deadline fires, and the result is that of a quiet run.
. "$(dirname "$0")/lib.sh"
: "${CLOCK_JUMP:?tests/launcher/clock_jump.c, as a library}"

prepare samples=45
sets="--set run.steps=200 --set run.deadline=5 --set parallel.experts=2 --set checkpoint.interval=50"
what="a quiet run"
run 2 train "$work/config.yaml" $sets --set run.directory="$work/straight"
expect_status 0
what="a clock that jumps"
printf '%s\n' 'echo $$ >"$WORK/pid.${OMPI_COMM_WORLD_RANK:-0}"' 'LD_PRELOAD=$CLOCK_JUMP exec "$ANTIPHON" "$@"' \
  >"$work/rank.sh"
export CLOCK_JUMP
run 2 train "$work/config.yaml" $sets
expect_status 0
grep -q 'deadline' "$work/err" && fail "expected no deadline to be mentioned"
expect_steps "$work/run" 200
expect_equal "content" "$(content "$(step_path "$work/straight" 200)")" "$(content "$(step_path "$work/run" 200)")"
what="the library that makes it jump"
day=$(LD_PRELOAD=$CLOCK_JUMP date +%F)
[ "$day" != "$(date +%F)" ] || fail "expected another day than today from it, got $day"
finish
