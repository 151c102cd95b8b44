# A checkpoint that is loaded at another layout and saved there at once holds the same: the content hash does not depend
# on ranks, experts over ranks, placement, or on whether the optimizer is sharded.
. "$(dirname "$0")/lib.sh"

step=6
steps="--set run.steps=$step"

# origin NAME RANKS [--set ...]: the run whose last checkpoint is carried around
origin() {
  what=$1 ranks=$2
  shift 2
  rm -rf "$work/run"
  run "$ranks" train "$work/config.yaml" $steps "$@"
  expect_status 0
  from=$(step_path "$work/run" $step)
  hash=$(content "$from")
  expect_equal "length of the content hash" 16 ${#hash}
  expect_equal "files" "$ranks" "$(find "$from" -name '*.ckpt' | wc -l)"
  note "$what: content $hash"
}

# carry NAME RANKS [--set ...]: from where it was last saved
carry() {
  what=$1 ranks=$2
  shift 2
  rm -rf "$work/to"
  run "$ranks" train "$work/config.yaml" $steps --resume "$from" --set run.directory="$work/to" "$@"
  expect_status 0
  expect_text "$work/err" "resumed at step $step from $from"
  expect_equal "files of $what" "$ranks" "$(find "$(step_path "$work/to" $step)" -name '*.ckpt' 2>/dev/null | wc -l)"
  expect_equal "content" "$hash" "$(content "$(step_path "$work/to" $step)")"
  rm -rf "$work/from"
  mv "$work/to" "$work/from"
  from=$(step_path "$work/from" $step)
}

prepare samples=45 absent=5
origin "1 rank" 1
carry "1 rank to 2, experts over them" 2 --set parallel.experts=2
carry "2 ranks to 4, experts over 2" 4 --set parallel.experts=2
carry "sharded to whole" 4 --set parallel.experts=2 --set parallel.shard_optimizer=false
carry "whole to sharded, experts over 4, partitioned" 4 --set parallel.experts=4 --set parallel.placement=partitioned
carry "4 ranks to 2, replicas" 2
carry "2 ranks to 1" 1

origin "4 ranks, experts over 2, the optimizer not sharded" 4 --set parallel.experts=2 --set parallel.shard_optimizer=false
first=$hash
carry "4 ranks to 1" 1
carry "1 rank to 4, sharded" 4 --set parallel.experts=2

# What must not be equal.
what="a step later"
run 1 train "$work/config.yaml" --set run.steps=$((step + 1)) --resume "$from" --set run.directory="$work/later"
expect_status 0
[ "$(content "$(step_path "$work/later" $((step + 1)))")" != "$first" ] || fail "expected another content"
finish
