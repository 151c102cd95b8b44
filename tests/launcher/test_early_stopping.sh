# Early stopping on mean recall and the best checkpoint: a run ends where it should, wherever it was interrupted and on
# whatever layout; the best checkpoint stays while others go, at every moment.
. "$(dirname "$0")/lib.sh"
prepare classes=6 samples=48
"$MAKE_SET" directory="$work/data/validation" classes=6 samples=21 shards=1 first=5000

# Evaluations every 4 steps, checkpoints elsewhere; patience 3. The rate does not hang on run.steps, which interrupts.
stopping="--set optimizer.schedule=constant --set run.steps=400 --set evaluate.interval=4 --set run.early_stopping.patience=3 --set checkpoint.keep=1"
best="--set checkpoint.keep_best=true"
train() { # RANKS ARGUMENTS...
  ranks=$1
  shift
  # shellcheck disable=SC2086
  run "$ranks" train "$work/config.yaml" $stopping $best "$@"
}

recalls() { # run directory: step and mean recall of each evaluation
  grep '"evaluation"' "$1/metrics.jsonl" | sed 's/{"step":\([0-9]*\),.*"mean_r1":\([^,]*\),.*/\1 \2/'
}

# By the recalls alone: where a run of this patience ends, and its best step
expected_end() {
  recalls "$1" | awk -v patience=3 '
    n == 0 || $2 > risen {risen = $2; stale = -1; best = $1} {n++; stale++; last = $1}
    stale >= patience {print last, best; exit} END {}'
}

best_of() { # run directory: the step that the link names
  readlink "$1/checkpoints/best" | sed 's/^step-0*//'
}

what="ends early"
train 1
expect_status 0
set -- $(expected_end "$work/run")
end=$1 top=$2
[ -n "$end" ] || fail "expected the recalls to stop rising: $(recalls "$work/run" | tr '\n' ' ')"
expect_equal "the last step" "$end" "$(steps_of "$work/run" | awk '{print $NF}')"
expect_text "$work/err" "stopping early at step $end: mean R@1 has not risen"
expect_equal "the best step" "$top" "$(best_of "$work/run")"
[ "$top" -lt "$end" ] || fail "expected the best step before the last"
expect_equal "checkpoints kept" "best step-$(printf %08d "$top") step-$(printf %08d "$end") " \
  "$(ls "$work/run/checkpoints" | tr '\n' ' ')"
run 1 check "$work/run/checkpoints/best"
expect_status 0

what="the best can be evaluated, and is what it was then"
run 1 eval "$work/run/checkpoints/best" --json
expect_status 0
expect_equal "its recall" "$(recalls "$work/run" | awk -v s="$top" '$1 == s {print $2}')" \
  "$(sed 's/.*"mean_r1":\([^,]*\),.*/\1/' "$work/out")"
run 1 eval "$work/run"
expect_text "$work/out" "step-$(printf %08d "$end")"
metrics "$work/run" "$work/straight"
recalls "$work/run" >"$work/recalls"

what="an ended run that is started again ends at once"
train 1
expect_status 0
expect_text "$work/err" "stopping early at step $end"
expect_equal "the last step" "$end" "$(steps_of "$work/run" | awk '{print $NF}')"
metrics "$work/run" "$work/again"
expect_same_file "metrics" "$work/straight" "$work/again"

what="more patience goes on"
# shellcheck disable=SC2086
run 1 train "$work/config.yaml" $stopping $best --set run.early_stopping.patience=4
expect_status 0
[ "$(steps_of "$work/run" | awk '{print $NF}')" -gt "$end" ] || fail "expected steps after $end"

# ---- interrupted: at steps that are and are not evaluated, before and after the best, on another layout ----

for at in 2 4 $((top - 1)) "$top" $((top + 1)) $((end - 4)) $((end - 1)); do
  for ranks in 1 2; do
    what="interrupted at step $at, resumed on $ranks ranks"
    rm -rf "$work/run"
    train 1 --set run.steps="$at"
    expect_status 0
    train "$ranks"
    expect_status 0
    expect_equal "the last step" "$end" "$(steps_of "$work/run" | awk '{print $NF}')"
    expect_equal "the best step" "$top" "$(best_of "$work/run")"
    recalls "$work/run" | cut -d ' ' -f 1 >"$work/evaluated"
    cut -d ' ' -f 1 "$work/recalls" | cmp -s - "$work/evaluated" || fail "other evaluations than $(cat "$work/recalls")"
  done
done

what="killed at any file operation on the best checkpoint's name, the old or the new one is there"
many=0
for n in 1 2 3 4 5 6; do
  rm -rf "$work/run"
  # shellcheck disable=SC2086
  fault "$n" exit checkpoints/best 1 train "$work/config.yaml" $stopping $best
  [ "$status" = 137 ] || continue
  many=$((many + 1))
  [ "$n" -le 2 ] || [ -L "$work/run/checkpoints/best" ] || fail "expected the first name"
  if [ -L "$work/run/checkpoints/best" ]; then
    run 1 check "$work/run/checkpoints/best"
    expect_status 0
  fi
  train 1
  expect_status 0
  expect_equal "the last step" "$end" "$(steps_of "$work/run" | awk '{print $NF}')"
  expect_equal "the best step" "$top" "$(best_of "$work/run")"
done
[ "$many" -ge 4 ] || fail "expected two operations on each of two names, met $many"

what="a name that cannot be written is a warning, the checkpoint stays, and the next start writes the name"
rm -rf "$work/run"
# shellcheck disable=SC2086
fault 1 28 checkpoints/best 1 train "$work/config.yaml" $stopping $best --set checkpoint.interval=2
expect_status 0
expect_text "$work/err" "cannot be marked" "stopping early at step $end"
[ -L "$work/run/checkpoints/best" ] && fail "expected no name"
train 1
expect_status 0
expect_equal "the best step" "$top" "$(best_of "$work/run")"
run 1 check "$work/run/checkpoints/best"
expect_status 0

what="saved at the steps that are evaluated, and at others"
for interval in 4 3; do
  rm -rf "$work/run"
  train 2 --set checkpoint.interval=$interval
  expect_status 0
  expect_equal "the best step" "$top" "$(best_of "$work/run")"
  run 1 check "$work/run/checkpoints"
  expect_status 0
done

what="without patience the run goes to its end and the best is kept"
rm -rf "$work/run"
# shellcheck disable=SC2086
run 1 train "$work/config.yaml" $stopping $best --set run.early_stopping.patience=0 --set run.steps=$((end + 10))
expect_status 0
expect_equal "the last step" "$((end + 10))" "$(steps_of "$work/run" | awk '{print $NF}')"
[ -L "$work/run/checkpoints/best" ] || fail "expected a best checkpoint"
grep -q "stopping early" "$work/err" && fail "stopped early"

# ---- a connector whose alternation follows the same evaluations ----

cat >"$work/connector.yaml" <<END
run: {directory: $work/connector, seed: 7, steps: 400, log: 50, deadline: 60, threads: 1,
  early_stopping: {patience: 4, min_delta: 0.02}}
data: {path: $work/data, shuffle: 16, cache: 8, modalities: [{name: image, positions: none}, {name: text, positions: none}]}
model: {kind: connector, width: 16, embedding: 8, activation: gelu, moe: {experts: 4, choose: 2, hidden: 24, noise: 0}}
objective: {directions: ["image:text", "text:image"], importance: 0, load: 0, z: 0}
schedule: {alternate: adaptive}
optimizer: {batch: 8, rate: 0.003, schedule: constant, warmup: 2}
checkpoint: {interval: 0, keep: 1, keep_best: true}
evaluate: {interval: 5, batch: 16, at_end: false}
END
what="a connector ends early"
run 1 train "$work/connector.yaml"
expect_status 0
expect_text "$work/err" "stopping early at step"
metrics "$work/connector" "$work/straight"
end=$(steps_of "$work/connector" | awk '{print $NF}') top=$(best_of "$work/connector")
[ "$top" -lt "$end" ] && [ "$end" -lt 400 ] || fail "expected an end after the best step $top and before 400, got $end"
for at in 3 "$top" $((end - 6)) $((end - 5)); do
  what="a connector interrupted at step $at"
  rm -rf "$work/connector"
  run 1 train "$work/connector.yaml" --set run.steps="$at"
  run 1 train "$work/connector.yaml"
  expect_status 0
  metrics "$work/connector" "$work/again"
  expect_same_file "metrics" "$work/straight" "$work/again"
  expect_equal "the best step" "$top" "$(best_of "$work/connector")"
done

what="what needs evaluations says so"
run 1 train "$work/config.yaml" --set run.early_stopping.patience=2
expect_status 1
expect_error "evaluate.interval: run.early_stopping follows"
finish
