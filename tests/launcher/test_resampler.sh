# Connectors that resample: a decoder trains, resumes on another layout, generates, goes out; a tower's vectors do not
# depend on how its items are read.
. "$(dirname "$0")/lib.sh"

prepare samples=48 absent=5 vocabulary=40
cat >"$work/decoder.yaml" <<END
run: {directory: $work/run, seed: 7, steps: 8, log: 5, deadline: 60, threads: 1}
data:
  path: $work/data
  validation: train
  shuffle: 16
  modalities:
    - {name: image, connector: resampler, positions: none, hidden: 8, queries: 5, depth: 2}
    - {name: text, positions: none}
model: {kind: decoder, vocabulary: 40, width: 16, layers: 2, heads: 2, hidden: 24, moe: {layers: all, experts: 4, choose: 2}}
optimizer: {batch: 8, rate: 0.003, warmup: 2, schedule: constant}
checkpoint: {interval: 0, keep: 10, busy: wait}
evaluate: {batch: 8, at_end: false}
END
tokens() { # run-directory: rows of the image in each step
  sed -n 's/.*"tokens":{"image":\([0-9]*\).*/\1/p' "$1/metrics.jsonl"
}

what="rows of the trunk"
run 1 train "$work/decoder.yaml" --set run.directory="$work/straight"
expect_status 0
[ "$(tokens "$work/straight" | wc -l)" = 8 ] || fail "expected eight steps in the metrics"
for count in $(tokens "$work/straight"); do
  [ $((count % 5)) = 0 ] && [ "$count" -gt 0 ] && [ "$count" -le 40 ] || fail "expected five rows an image, got $count"
done
run 2 train "$work/decoder.yaml" --set run.directory="$work/two" --set parallel.experts=2
expect_status 0
expect_equal "rows on two ranks" "$(tokens "$work/straight" | tr '\n' ' ')" "$(tokens "$work/two" | tr '\n' ' ')"

what="resume"
run 1 train "$work/decoder.yaml" --set run.steps=5
expect_status 0
run 1 train "$work/decoder.yaml"
expect_status 0
expect_text "$work/err" "resumed at step 5"
expect_equal "content" "$(content "$(step_path "$work/straight" 8)")" "$(content "$(step_path "$work/run" 8)")"
run 1 train "$work/decoder.yaml" --set run.directory="$work/recomputed" --set model.recompute=true
expect_equal "content with recomputation" "$(content "$(step_path "$work/straight" 8)")" \
  "$(content "$(step_path "$work/recomputed" 8)")"

what="another number of queries"
run 2 train "$work/decoder.yaml" --set data.modalities.image.queries=6 --set run.steps=9
expect_status 1
expect_error "connector.image.query"

what="homogeneous batches, sharded moments, bfloat16"
run 2 train "$work/decoder.yaml" --set run.directory="$work/other" --set data.batches=homogeneous \
  --set parallel.shard_optimizer=true --set run.precision=bfloat16 --set optimizer.accumulate=2
expect_status 0

what="generation"
run 1 eval "$work/run" --generate 6
expect_status 0
[ "$(grep -c '^{"id":[0-9]*,"tokens":\[[0-9,]*\]}$' "$work/out")" = 48 ] || fail "expected a line of tokens a sample"
cp "$work/out" "$work/greedy"
run 1 eval "$work/run" --generate 6 --set evaluate.batch=5
expect_status 0
expect_same_file "tokens in other batches" "$work/greedy" "$work/out"

what="export"
run 1 export "$(step_path "$work/run" 8)" -o "$work/out.hf"
expect_status 0
head -c 60000 "$work/out.hf/model.safetensors" | tr -dc '[:print:]' >"$work/header"
for name in query layers.1.cross.kv.weight layers.0.self_norm.bias out.weight; do
  expect_text "$work/header" "\"antiphon.connector.image.$name\""
done

what="vectors"
set -- --set data.modalities.image.connector=resampler --set data.modalities.image.positions=rope \
  --set data.modalities.image.queries=3 --set data.modalities.image.depth=1
run 2 train "$work/config.yaml" --set run.directory="$work/tower" --set run.steps=4 --set parallel.experts=2 "$@" \
  --set parallel.placement=partitioned
expect_status 0
for ranks in 1 2; do
  run $ranks embed "$work/tower" "$work/data" --split train --key image -o "$work/vectors.$ranks.h5"
  expect_status 0
done
expect_same_file "vectors of one rank and of two" "$work/vectors.1.h5" "$work/vectors.2.h5"
run 1 eval "$work/tower"
expect_status 0
finish
