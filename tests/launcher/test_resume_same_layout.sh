# Resume on one layout: N + M steps equal N steps, save, load, M steps, bit for bit.
. "$(dirname "$0")/lib.sh"

# resume_equals NAME RANKS N M [--set ...]: the uninterrupted run saves step N on its way.
resume_equals() {
  what=$1 ranks=$2 first=$3 last=$(($3 + $4))
  shift 4
  note "$what: $ranks ranks, steps $first + $((last - first))"
  rm -rf "$work/run" "$work/cut" "$work/other"
  run "$ranks" train "$work/config.yaml" --set run.steps=$last --set checkpoint.interval="$first" "$@"
  expect_status 0
  whole=$(content "$(step_path "$work/run" $last)")
  [ -n "$whole" ] || fail "expected a checkpoint of step $last"
  metrics "$work/run" "$work/expected"

  # From a path, into another run directory
  run "$ranks" train "$work/config.yaml" --set run.steps=$last --set checkpoint.interval="$first" "$@" \
    --resume "$(step_path "$work/run" "$first")" --set run.directory="$work/other"
  expect_status 0
  expect_text "$work/err" "resumed at step $first"
  expect_equal "content after --resume PATH" "$whole" "$(content "$(step_path "$work/other" $last)")"
  expect_steps "$work/other" $last $((first + 1))
  awk -F '[:,]' -v first="$first" '$2 > first' "$work/expected" >"$work/later"
  metrics "$work/other" "$work/got"
  expect_same_file "metrics after --resume PATH" "$work/later" "$work/got"

  # By itself, in a run directory whose metrics go on beyond the checkpoint, as after a kill
  mv "$(step_path "$work/run" "$first")" "$work/kept"
  rm -rf "$work/run/checkpoints"/step-*
  mv "$work/kept" "$(step_path "$work/run" "$first")"
  printf '{"step":%s,"epoch":0,"torn' $((last + 1)) >>"$work/run/metrics.jsonl"
  run "$ranks" train "$work/config.yaml" --set run.steps=$last --set checkpoint.interval="$first" "$@"
  expect_status 0
  expect_text "$work/err" "resumed at step $first"
  expect_equal "content after automatic resume" "$whole" "$(content "$(step_path "$work/run" $last)")"
  metrics "$work/run" "$work/got"
  expect_same_file "metrics after automatic resume" "$work/expected" "$work/got"
  expect_steps "$work/run" $last
}

prepare samples=45 absent=5
# 45 samples, batches of 8: step 6 takes the last 5 of epoch 0 and the first 3 of epoch 1.
resume_equals "inside an epoch" 1 3 2
resume_equals "across the end of an epoch, two threads" 1 5 9 --set run.threads=2
resume_equals "many epochs, saved in the middle of a batch's epoch" 1 17 20
resume_equals "accumulation" 1 5 4 --set optimizer.accumulate=2
resume_equals "capacity" 1 5 4 --set model.moe.dispatch=capacity --set model.moe.choose=2
resume_equals "experts over ranks, shared" 2 5 4 --set parallel.experts=2
resume_equals "experts over ranks, partitioned" 2 5 4 --set parallel.experts=2 --set parallel.placement=partitioned
resume_equals "replicas and accumulation" 2 5 4 --set optimizer.accumulate=2
resume_equals "replicas, each with the whole optimizer" 2 5 4 --set parallel.shard_optimizer=false
resume_equals "bfloat16, recomputed" 2 5 4 --set run.precision=bfloat16 --set model.recompute=true

# A connector between latent spaces, resumed inside a block, inside a cycle, and after an adaptive schedule has learned
# from an evaluation.
cp "$work/config.yaml" "$work/tower.yaml"
cat >"$work/config.yaml" <<END
run: {directory: $work/run, seed: 7, steps: 20, log: 5, deadline: 60, threads: 1}
data:
  path: $work/data
  shuffle: 16
  cache: 8
  modalities: [{name: image, positions: none}, {name: text, positions: none}]
model: {kind: connector, width: 16, embedding: 8, activation: gelu,
  moe: {experts: 4, choose: 2, hidden: 24, bias: true, dropout: 0.1, noise: 0}}
objective: {directions: ["image:text", "text:image"], importance: 0, load: 0, z: 0}
optimizer: {batch: 8, rate: 0.003, warmup: 2}
checkpoint: {interval: 0, keep: 10}
evaluate: {batch: 16, at_end: false}
END
resume_equals "a connector, in the middle of a cycle" 1 5 4 --set schedule.alternate=cyclic
resume_equals "a connector, in the middle of a block" 2 5 6 --set schedule.alternate=block \
  --set 'schedule.steps=[3, 4]' --set parallel.experts=2
resume_equals "a connector, adaptive" 1 9 8 --set schedule.alternate=adaptive --set evaluate.interval=4 \
  --set schedule.gain=20
resume_equals "a connector, joint" 2 5 4 --set parallel.experts=2 --set parallel.placement=partitioned

# A decoder: tokens come from the shards, its losses need no second pass where the router has none.
cat >"$work/decoder.yaml" <<END
run: {directory: $work/run, seed: 7, steps: 20, log: 5, deadline: 60, threads: 1}
data:
  path: $work/data
  shuffle: 16
  cache: 8
  modalities: [{name: image, positions: none}, {name: text, connector: mlp}]
model: {kind: decoder, vocabulary: 40, width: 16, layers: 2, heads: 2, qkv_bias: true,
  moe: {experts: 4, choose: 2, hidden: 24, gate: renormalised}}
optimizer: {batch: 8, rate: 0.003, warmup: 2}
checkpoint: {interval: 0, keep: 10}
evaluate: {batch: 16, at_end: false}
END
rm -rf "$work/data"
prepare samples=45 absent=5 vocabulary=40
cp "$work/decoder.yaml" "$work/config.yaml"
resume_equals "a decoder" 1 3 4
resume_equals "a decoder, experts over ranks, accumulation" 2 5 4 --set parallel.experts=2 --set optimizer.accumulate=2
resume_equals "a decoder, tied, no router losses" 2 5 4 --set model.tied=true --set objective.importance=0 \
  --set objective.load=0 --set objective.z=0 --set optimizer.accumulate=2
resume_equals "a decoder, homogeneous batches, over the end of an epoch" 2 3 8 --set data.batches=homogeneous
resume_equals "a decoder, homogeneous batches, incomplete ones dropped" 1 7 6 --set data.batches=homogeneous \
  --set data.incomplete=drop

rm -rf "$work/data"
prepare samples=48
resume_equals "exactly at the end of an epoch" 1 6 7
resume_equals "exactly at the end of an epoch, partitioned" 2 6 7 \
  --set parallel.experts=2 --set parallel.placement=partitioned
finish
