# What keeps data and state together over a long run: a set with an index, samples that are not finite, saves that fall
# due while the one before is being written, and eight ranks that go on from one and back.
. "$(dirname "$0")/lib.sh"

# Two runs of equal settings took the same steps.
expect_same_steps() { # directory directory
  metrics "$1" "$work/first.metrics"
  metrics "$2" "$work/second.metrics"
  expect_same_file "metrics" "$work/first.metrics" "$work/second.metrics"
}

keep_run() { # as
  rm -rf "$work/$1"
  mv "$work/run" "$work/$1"
}

prepare samples=45 absent=5 shards=3

# ---- index ----
what="without an index"
run 2 train "$work/config.yaml" --set evaluate.at_end=true
expect_status 0
keep_run plain
what="antiphon index"
run 1 index "$work/data"
expect_status 0
expect_text "$work/out" "train/shards.index: 45 samples in 3 shards" "validation/shards.index: 21 samples"
for ranks in 1 2 4; do
  what="with an index, $ranks ranks"
  run $ranks train "$work/config.yaml" --set evaluate.at_end=true
  expect_status 0
  [ $ranks = 2 ] && expect_same_steps "$work/plain" "$work/run"
  expect_close 1e-4 "$work/plain" "$work/run"
  rm -rf "$work/run"
done
what="antiphon check of an index"
run 1 check "$work/data"
expect_status 0
expect_text "$work/out" "its index says what the shards say"
what="a shard that was changed after the index was made"
touch "$work/data/train/text-00001.h5"
run 2 train "$work/config.yaml"
expect_status 1
expect_error "text-00001.h5" "antiphon index"
rm "$work"/data/*/shards.index "$work"/data/train/*
"$MAKE_SET" directory="$work/data/train" samples=45 absent=5 shards=3 nan=text nan_sample=17

# ---- samples that are not finite ----
what="NaN, the run stops"
run 2 train "$work/config.yaml"
expect_status 1
expect_error "text-00001.h5" "NaN"
rm -rf "$work/run"
what="NaN to be skipped, but nobody has listed such samples"
run 2 train "$work/config.yaml" --set data.non_finite=skip
expect_status 1
expect_error "antiphon index --values"
rm -rf "$work/run"
what="antiphon index --values"
run 1 index "$work/data" --values
expect_status 0
expect_text "$work/out" "45 samples in 3 shards of 2 modalities" "1 not finite"
for ranks in 1 2; do
  what="NaN, skipped, $ranks ranks"
  run $ranks train "$work/config.yaml" --set data.non_finite=skip
  expect_status 0
  expect_text "$work/err" "modality text: 1 samples hold NaN or infinity"
  expect_steps "$work/run" 20
  keep_run skipped.$ranks
done
expect_close 1e-4 "$work/skipped.1" "$work/skipped.2"
what="NaN with an index that lists it, and not to be skipped"
run 2 train "$work/config.yaml"
expect_status 1
expect_error "text-00001.h5" "NaN"
rm -rf "$work/run" "$work/data"
prepare samples=45 absent=5

# ---- saves that fall due too early ----
what="a save every step, waited for"
run 2 train "$work/config.yaml" --set checkpoint.interval=1 --set checkpoint.keep=30
expect_status 0
expect_equal "checkpoints" 20 "$(ls "$work/run/checkpoints" | grep -c '^step-[0-9]*$')"
keep_run waited
what="a save every step, delayed by the one before"
run 2 train "$work/config.yaml" --set checkpoint.interval=1 --set checkpoint.keep=30 --set checkpoint.busy=delay
expect_status 0
[ -d "$(step_path "$work/run" 20)" ] || fail "the last step was not saved"
for checkpoint in "$work"/run/checkpoints/step-*; do
  expect_equal "content of $(basename "$checkpoint")" \
    "$(content "$work/waited/checkpoints/$(basename "$checkpoint")")" "$(content "$checkpoint")"
done

# ---- one rank to eight and back ----
first=4 last=8
steps="--set run.steps=$last --set checkpoint.interval=$first --set model.moe.experts=8 --set optimizer.batch=16"

continue_on() { # NAME RANKS [--set ...]
  what=$1 ranks=$2
  shift 2
  rm -rf "$work/other"
  run "$ranks" train "$work/config.yaml" $steps --set run.directory="$work/other" \
    --resume "$(step_path "$work/run" $first)" "$@"
  expect_status 0
  expect_steps "$work/other" $last $((first + 1))
  expect_close 1e-4 "$work/run" "$work/other"
}

rm -rf "$work/run"
what="one rank"
run 1 train "$work/config.yaml" $steps
expect_status 0
continue_on "1 rank to 8, experts over 8" 8 --set parallel.experts=8
rm -rf "$work/run"
what="eight ranks, experts over them"
run 8 train "$work/config.yaml" $steps --set parallel.experts=8
expect_status 0
continue_on "8 ranks to 1" 1
continue_on "8 ranks, experts over 8 to replicas" 8
finish
