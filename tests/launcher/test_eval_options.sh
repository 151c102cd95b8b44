# antiphon eval: dropless whatever training did, with capacity only where asked for; JSON; a model's costs by inspect.
. "$(dirname "$0")/lib.sh"
prepare
run 1 train "$work/config.yaml" --set model.moe.dispatch=capacity --set model.moe.capacity=0.5
expect_status 0
grep -v '"evaluation"' "$work/run/metrics.jsonl" | tail -n 1 >"$work/line"
grep -q '"dropped":0\.[0-9]' "$work/line" || fail "expected drops in training"

# The shares of dropped tokens of all layers and modalities
dropped() { # file of JSON
  grep -o '"dropped":[0-9.e-]*' "$1" | sort -u | tr '\n' ' '
}

what="dropless, whatever training did"
run 1 eval "$work/run"
expect_status 0
cp "$work/out" "$work/dropless"
expect_text "$work/out" "image -> text" "mixture, modality"
expect_equal "rows of layers and modalities" 4 "$(grep -cE '^[12], (image|text) +[0-9]+ +0\.00%' "$work/out")"
run 1 eval "$work/run" --json
expect_status 0
cp "$work/out" "$work/json"
expect_equal "lines" 1 "$(lines "$work/out")"
expect_text "$work/out" '{"step":20,"evaluation":{"samples":21,"mean_r1":' '"image:text":{"queries":21,"r1":' '"layers":['
expect_equal "dropped" '"dropped":0 ' "$(dropped "$work/out")"

what="with capacity, on 1 and 2 ranks"
run 1 eval "$work/run" --json --capacity 0.5
expect_status 0
cp "$work/out" "$work/capacity"
[ "$(dropped "$work/out")" != '"dropped":0 ' ] || fail "expected drops: $(cat "$work/out")"
run 2 eval "$work/run" --json --capacity 0.5
expect_status 0
expect_equal "dropped on 2 ranks" "$(dropped "$work/capacity")" "$(dropped "$work/out")"
for file in capacity out; do
  sed 's/.*\("retrieval":{.*}\),"layers".*/\1/' "$work/$file" >"$work/$file.recall"
done
expect_same_file "recall on 1 and 2 ranks" "$work/capacity.recall" "$work/out.recall"

what="room for everything is dropless"
run 1 eval "$work/run" --capacity 4
expect_status 0
expect_same_file "the tables" "$work/dropless" "$work/out"

what="no such capacity"
run 2 eval "$work/run" --capacity much
expect_status 1
expect_error "evaluate.capacity: expected none, or a number from 0.001 to 1000 with at most three decimals, got 'much'"
what="groups that a batch cuts"
run 2 eval "$work/run" --capacity 1 --set evaluate.batch=18
expect_status 1
expect_error "evaluate.batch: with evaluate.capacity routing groups of 2 samples must divide the batch of 18 on each of 2"

what="evaluations of a run, with capacity while training drops nothing"
rm -rf "$work/run"
run 2 train "$work/config.yaml" --set evaluate.capacity=0.5 --set evaluate.interval=10
expect_status 0
grep '"evaluation"' "$work/run/metrics.jsonl" >"$work/evaluations"
grep -v '"evaluation"' "$work/run/metrics.jsonl" >"$work/steps"
[ "$(dropped "$work/evaluations")" != '"dropped":0 ' ] || fail "expected drops in the evaluations"
expect_equal "dropped in training" '"dropped":0 ' "$(dropped "$work/steps")"
run 1 eval "$work/run" --json
expect_equal "dropped by eval, which was not asked for capacity" '"dropped":0 ' "$(dropped "$work/out")"

# ---- what a model costs ----

what="inspect a configuration"
run 1 inspect "$work/config.yaml"
expect_status 0
total=$(sed -n 's/^# \([0-9]*\) parameters.*/\1/p' "$work/out")
run 1 inspect "$work/config.yaml" --json
expect_status 0
expect_text "$work/out" "{\"parameters\":$total," '"paths":{"image":{"parameters":' '"token_flops":'
run 1 train "$work/config.yaml" --set run.directory="$work/other" --set run.steps=1
expect_text "$work/err" "$(awk -v n="$total" 'BEGIN {printf "%.2f M parameters", n / 1e6}')" "forward pass of image: "
run 1 inspect "$work/config.yaml" --json --set model.trunks=per_modality
expect_status 0
expect_text "$work/out" '"experts":0,'
what="inspect a configuration without its data"
run 1 inspect "$work/config.yaml" --set data.path="$work/nowhere"
expect_status 0
expect_text "$work/out" "# without connectors: there are no latents in $work/nowhere/train"
finish
