# What is frozen has no moments in a checkpoint; a run that goes on with another frozen set keeps the moments of what
# is trained in both, begins those of what is newly trained at 0, and leaves the rest behind.
. "$(dirname "$0")/lib.sh"

holds() { # checkpoint prefix: how many tensors
  grep -o "\"name\":\"$2[^\"]*\"" "$1/manifest.json" | wc -l
}

prepare samples=45
some="--set optimizer.schedule=constant --set optimizer.frozen=[blocks.0.*,connector.image.*]"
other="--set optimizer.frozen=[blocks.1.*]"
for ranks in 1 2; do
  what="moments of the trained alone, $ranks ranks"
  rm -rf "$work/run" "$work/whole"
  run $ranks train "$work/config.yaml" --set run.steps=4 $some
  expect_status 0
  saved=$(step_path "$work/run" 4)
  all=$(holds "$saved" parameter/) frozen=$(($(holds "$saved" parameter/blocks.0.) + $(holds "$saved" parameter/connector.image.)))
  [ "$frozen" -gt 0 ] || fail "expected frozen parameters in the checkpoint"
  for kind in adam_m adam_v adam_steps; do
    expect_equal "$kind" $((all - frozen)) "$(holds "$saved" $kind/)"
    expect_equal "$kind of frozen ones" 0 "$(holds "$saved" $kind/blocks.0.)"
  done

  what="another frozen set, $ranks ranks"
  cp -r "$work/run" "$work/whole"
  run $ranks train "$work/config.yaml" --set run.steps=8 $other
  expect_status 0
  expect_text "$work/err" "resumed at step 4" "$frozen parameters were not trained in" \
    "$(holds "$saved" adam_m/blocks.1.) parameters that were trained in"
  saved=$(step_path "$work/run" 8)
  expect_equal "moments of block 1" 0 "$(holds "$saved" adam_m/blocks.1.)"
  [ "$(holds "$saved" adam_m/blocks.0.)" -gt 0 ] || fail "expected moments of block 0"

  what="the same frozen set, $ranks ranks"
  run $ranks train "$work/config.yaml" --set run.steps=8 --set run.directory="$work/whole" $some
  expect_status 0
  grep -q -e "were not trained" -e "left behind" "$work/err" && fail "expected no word about moments"
  rm -rf "$work/run"
  run $ranks train "$work/config.yaml" --set run.steps=8 $some
  expect_equal "content" "$(content "$(step_path "$work/run" 8)")" "$(content "$(step_path "$work/whole" 8)")"
done
finish
