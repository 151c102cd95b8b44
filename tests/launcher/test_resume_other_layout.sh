# Resume on another layout: every later loss is that of the run that went on undisturbed, within 1e-4.
. "$(dirname "$0")/lib.sh"

first=4 last=14
steps="--set run.steps=$last --set checkpoint.interval=$first"

# original RANKS [--set ...]: the undisturbed run, which saves step 4
original() {
  ranks=$1
  what="the undisturbed run on $ranks ranks"
  shift
  rm -rf "$work/run"
  run "$ranks" train "$work/config.yaml" $steps "$@"
  expect_status 0
}

# continue_on NAME RANKS [--set ...]
continue_on() {
  what=$1 ranks=$2
  shift 2
  note "$what"
  rm -rf "$work/other"
  run "$ranks" train "$work/config.yaml" $steps --set run.directory="$work/other" \
    --resume "$(step_path "$work/run" $first)" "$@"
  expect_status 0
  expect_steps "$work/other" $last $((first + 1))
  expect_close 1e-4 "$work/run" "$work/other"
}

prepare samples=45 absent=5
original 1
continue_on "1 rank to 2, replicas" 2
continue_on "1 rank to 2, experts over them" 2 --set parallel.experts=2
continue_on "1 rank to 4, experts over 2, partitioned, accumulation" 4 --set parallel.experts=2 \
  --set parallel.placement=partitioned --set optimizer.accumulate=2
continue_on "1 rank to 4, experts over 2, the optimizer not sharded" 4 --set parallel.experts=2 \
  --set parallel.shard_optimizer=false
original 4 --set parallel.experts=2
continue_on "4 ranks with a sharded optimizer to 1" 1
continue_on "4 ranks, sharded to whole" 4 --set parallel.experts=2 --set parallel.shard_optimizer=false
original 2 --set parallel.experts=2 --set parallel.placement=partitioned
continue_on "2 ranks to 1" 1
continue_on "2 ranks, partitioned to shared" 2 --set parallel.experts=2
continue_on "2 ranks to 4, experts over 4" 4 --set parallel.experts=4
towers="--set model.trunks=per_modality"
original 2 $towers --set parallel.experts=2 --set parallel.placement=partitioned
continue_on "a tower for each modality, 2 ranks to 1" 1 $towers
continue_on "a tower for each modality, partitioned to shared on 4" 4 $towers

counts="--set model.moe.layer_experts=[3,5] --set model.moe.added=[0,2]"
original 2 $counts --set parallel.experts=2
continue_on "layers of 3 and of 5 experts, 2 ranks to 1" 1 $counts
continue_on "layers of 3 and of 5 experts, over 4 ranks, one of which holds none of the 3" 4 $counts \
  --set parallel.experts=4

# A run directory that has seen three layouts still has every step once.
what="three layouts in one run directory"
rm -rf "$work/run"
run 1 train "$work/config.yaml" --set run.steps=6 --set optimizer.schedule=constant
run 2 train "$work/config.yaml" --set run.steps=9 --set optimizer.schedule=constant --set parallel.experts=2
expect_text "$work/err" "resumed at step 6" "written by 1 ranks"
run 1 train "$work/config.yaml" --set run.steps=12 --set optimizer.schedule=constant
expect_text "$work/err" "resumed at step 9" "written by 2 ranks, expert-parallel size 2"
expect_status 0
expect_steps "$work/run" 12
finish
