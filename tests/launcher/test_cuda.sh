# The command on a CUDA device: training, evaluation, checkpoints and resuming go through the device's memory; several
# ranks by NCCL or sharing a device; and what is not there or too small is said before the first step.
. "$(dirname "$0")/lib.sh"

prepare samples=45 absent=5
sets="--set run.device=cuda --set run.steps=6 --set checkpoint.interval=3 --set evaluate.at_end=true"
what="is there a device"
run 1 train "$work/config.yaml" --set run.device=cuda --set run.steps=0
if [ "$status" != 0 ]; then
  expect_error "cuda"
  [ "$failures" = 0 ] && echo "skipped: $(cat "$work/error-line")" && exit 77
fi

what="one rank"
rm -rf "$work/run"
run 1 train "$work/config.yaml" $sets
expect_status 0
expect_text "$work/err" "cuda:0"
expect_steps "$work/run" 6
whole=$(content "$(step_path "$work/run" 6)")
metrics "$work/run" "$work/expected"
what="the same seed again"
rm -rf "$work/again"
run 1 train "$work/config.yaml" $sets --set run.directory="$work/again"
expect_equal "content" "$whole" "$(content "$(step_path "$work/again" 6)")"
metrics "$work/again" "$work/got"
expect_same_file "metrics" "$work/expected" "$work/got"
what="resumed"
run 1 train "$work/config.yaml" $sets --resume "$(step_path "$work/run" 3)" --set run.directory="$work/later"
expect_status 0
expect_equal "content" "$whole" "$(content "$(step_path "$work/later" 6)")"
what="the same run on the CPU"
run 1 train "$work/config.yaml" $sets --set run.device=cpu --set run.directory="$work/host"
expect_status 0
expect_close 1e-3 "$work/run" "$work/host"
what="resumed on the CPU from the device's checkpoint"
run 1 train "$work/config.yaml" $sets --set run.device=cpu --resume "$(step_path "$work/run" 3)" \
  --set run.directory="$work/moved"
expect_status 0
expect_close 1e-3 "$work/run" "$work/moved"

what="two ranks, experts over them"
export CUDA_DOUBLE_DEVICES=2
rm -rf "$work/pair"
run 2 train "$work/config.yaml" $sets --set parallel.experts=2 --set parallel.chunks=2 --set run.directory="$work/pair"
expect_status 0
grep -q "between devices staged" "$work/err" || expect_text "$work/err" "gradients reduced during the backward pass"
expect_close 1e-3 "$work/run" "$work/pair"
unset CUDA_DOUBLE_DEVICES
what="two ranks on one device"
rm -rf "$work/pair"
run 2 train "$work/config.yaml" $sets --set parallel.experts=2 --set parallel.transport=staged \
  --set run.directory="$work/pair"
expect_status 0
expect_text "$work/err" "between devices staged"
expect_close 1e-3 "$work/run" "$work/pair"
what="bfloat16, recomputed"
rm -rf "$work/pair"
run 1 train "$work/config.yaml" $sets --set run.precision=bfloat16 --set model.recompute=true \
  --set run.directory="$work/pair"
expect_status 0
expect_close 5e-2 "$work/run" "$work/pair"

# Vectors of the device and of the CPU find the same
for device in cuda cpu; do
  what="embedding on $device"
  for modality in image text; do
    run 1 embed "$work/run" --key $modality --set run.device=$device -o "$work/$device-$modality.h5"
    expect_status 0
  done
  run 1 search "$work/$device-text.h5" --query "$work/$device-image.h5" -k 1
  expect_status 0
  awk '{print $1, $3}' "$work/out" >"$work/$device-found"
done
expect_equal "lines" 22 "$(lines "$work/cpu-found")"
expect_same_file "best matches" "$work/cpu-found" "$work/cuda-found"

what="more than the device holds"
run 1 train "$work/config.yaml" $sets --set model.hidden=16000000 --set run.directory="$work/none"
expect_status 1
expect_error "needs" "MiB free of" "parameters and optimizer"
what="no device"
CUDA_VISIBLE_DEVICES= CUDA_DOUBLE_DEVICES=0 run 1 train "$work/config.yaml" $sets --set run.directory="$work/none"
expect_status 1
expect_error "no CUDA device"
[ ! -e "$work/none" ] || fail "expected nothing at run.directory"
finish
