# Adapters over a trained model: checkpoints of what is trained alone find their base, resume bit for bit and say what is
# wrong when they cannot; a merged model is the adapted one.
. "$(dirname "$0")/lib.sh"

parameters() { # checkpoint: names, sorted
  grep -o '"name":"parameter/[^"]*"' "$1/manifest.json" | sed 's/.*parameter\///; s/"//' | LC_ALL=C sort
}

prepare samples=45
mkdir "$work/all"
base=$(step_path "$work/all/base" 6)
run 1 train "$work/config.yaml" --set run.steps=6 --set run.directory="$work/all/base"
expect_status 0
adapters="model.lora=[{parameters: blocks.*.attention.*, rank: 4, dropout: 0.2}, {parameters: blocks.*.experts.*, rank: 2, alpha: 8}]"
frozen="optimizer.frozen=['*norm*','*position*',head.*,log_scale]"
tuned() { # ranks directory steps arguments...
  ranks=$1 directory=$2 steps=$3
  shift 3
  run "$ranks" train "$work/config.yaml" --set "$adapters" --set "$frozen" \
    --set optimizer.schedule=constant --set run.directory="$directory" --set run.steps="$steps" "$@"
}

for ranks in 1 2; do
  what="trained parameters alone, $ranks ranks"
  rm -rf "$work/all/some" "$work/all/straight" "$work/all/whole" "$work/merged" "$work/other"
  tuned $ranks "$work/all/some" 8 --from "$base" --set checkpoint.contents=trained
  expect_status 0
  saved=$(step_path "$work/all/some" 8)
  parameters "$base" >"$work/base.names"
  parameters "$saved" >"$work/some.names"
  grep -q 'blocks.1.experts.3.in.lora_b.weight' "$work/some.names" || fail "expected adapters in the checkpoint"
  grep -q 'blocks.0.router.weight' "$work/some.names" || fail "expected routers in the checkpoint"
  grep -q -e 'norm' -e 'experts.[0-9]*.in.weight' -e 'head' "$work/some.names" && fail "expected nothing frozen in it"
  [ "$(grep -c . "$work/some.names")" -gt 10 ] || fail "expected many trained parameters"

  what="resumed from its base, $ranks ranks"
  tuned $ranks "$work/all/some" 12 --from "$base" --set checkpoint.contents=trained
  expect_status 0
  expect_text "$work/err" "resumed at step 8"
  tuned $ranks "$work/all/straight" 12 --from "$base" --set checkpoint.contents=trained
  expect_equal "content" "$(content "$(step_path "$work/all/straight" 12)")" "$(content "$(step_path "$work/all/some" 12)")"

  what="merged, $ranks ranks"
  tuned $ranks "$work/all/whole" 12 --from "$base"
  expect_status 0
  run 1 merge "$(step_path "$work/all/some" 12)" -o "$work/merged"
  expect_status 0
  expect_text "$work/err" "merged 20 adapters"
  parameters "$work/merged/step-00000012" >"$work/merged.names"
  expect_same_file "parameters" "$work/base.names" "$work/merged.names"
  run 1 merge "$(step_path "$work/all/whole" 12)" -o "$work/other"
  expect_equal "content" "$(content "$work/merged/step-00000012")" "$(content "$work/other/step-00000012")"
done

what="the merged model is the adapted one"
"$ANTIPHON" eval "$work/all/some" 2>/dev/null | grep -- '->' >"$work/adapted"
"$ANTIPHON" eval "$work/merged/step-00000012" 2>/dev/null | grep -- '->' >"$work/folded"
[ -s "$work/adapted" ] || fail "expected the recall of each direction"
expect_same_file "recall" "$work/adapted" "$work/folded"
rm -rf "$work/one" "$work/two"
tuned 1 "$work/one" 1 --from "$(step_path "$work/all/some" 12)" --set 'optimizer.rate=0' --set "model.lora=[{parameters: 'blocks.*.attention.*', rank: 4}, {parameters: 'blocks.*.experts.*', rank: 2, alpha: 8}]"
expect_status 0
run 1 train "$work/config.yaml" --set run.directory="$work/two" --set run.steps=1 --from "$work/merged/step-00000012"
expect_status 0
expect_close 0.000002 "$work/one" "$work/two"

what="moved together with its base"
before=$("$ANTIPHON" eval "$work/all/some" 2>/dev/null)
mv "$work/all" "$work/moved"
expect_equal "evaluation" "$(echo "$before" | sed 1d)" "$("$ANTIPHON" eval "$work/moved/some" 2>/dev/null | sed 1d)"
what="exported whole"
run 1 export "$(step_path "$work/moved/some" 12)" -o "$work/exported"
expect_status 0
grep -q lora_ "$work/exported/model.safetensors" && fail "expected no adapters outside"
what="nothing to merge"
run 1 merge "$work/merged/step-00000012" -o "$work/again"
expect_status 1
expect_error "no adapters to merge"
what="merged into what is there"
run 1 merge "$(step_path "$work/moved/some" 12)" -o "$work/merged"
expect_status 1
expect_error "is there already"

for ranks in 1 2; do
  what="another base, $ranks ranks"
  mv "$work/moved/base" "$work/moved/kept"
  run 1 train "$work/config.yaml" --set run.steps=6 --set run.seed=8 --set run.directory="$work/moved/base"
  tuned $ranks "$work/moved/some" 14 --set checkpoint.contents=trained
  expect_status 1
  expect_error "was trained on a base of content" "it is another one"
  what="no base, $ranks ranks"
  rm -rf "$work/moved/base"
  tuned $ranks "$work/moved/some" 14 --set checkpoint.contents=trained
  expect_status 1
  expect_error "its base is neither at ../base/checkpoints/step-00000006"
  mv "$work/moved/kept" "$work/moved/base"
  what="trained once and frozen now, $ranks ranks"
  tuned $ranks "$work/moved/some" 14 --set checkpoint.contents=trained --set "optimizer.frozen=['*router*']"
  expect_status 1
  expect_error "checkpoint.contents" "router.weight' was trained in this run and is frozen now"
  what="goes on whole, $ranks ranks"
  cp -r "$work/moved/some" "$work/moved/copy"
  tuned $ranks "$work/moved/copy" 14
  expect_status 0
  what="a whole one made partial, $ranks ranks"
  tuned $ranks "$work/moved/copy" 16 --set checkpoint.contents=trained
  expect_status 1
  expect_error "checkpoint.contents" "holds everything"
  rm -rf "$work/moved/copy"
  what="nothing to begin with, $ranks ranks"
  tuned $ranks "$work/fresh" 4 --set checkpoint.contents=trained
  expect_status 1
  expect_error "checkpoint.contents" "--from CHECKPOINT"
done
finish
