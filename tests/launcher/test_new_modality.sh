# A modality is added to a trained connector: what is new is created, what is old is kept, and with it frozen the old
# directions answer exactly as before.
. "$(dirname "$0")/lib.sh"

write_connector() { # file, modalities, directions, run directory
  cat >"$1" <<END
run: {directory: $4, seed: 7, steps: 12, log: 5, deadline: 60, threads: 1}
data: {path: $work/data, shuffle: 16, cache: 8, modalities: [$2]}
model: {kind: connector, width: 16, embedding: 8, activation: gelu,
  moe: {experts: 4, choose: 2, hidden: 24, bias: true, noise: 0}}
objective: {directions: [$3], importance: 0, load: 0, z: 0}
optimizer: {batch: 8, rate: 0.01, warmup: 2}
schedule: {alternate: cyclic}
checkpoint: {interval: 0, keep: 10}
evaluate: {batch: 16, at_end: false}
END
}
old='{name: image, positions: none}, {name: text, positions: none}'
prepare samples=45 speech=7
"$MAKE_SET" directory="$work/data/validation" samples=21 shards=1 first=5000 speech=7
write_connector "$work/two.yaml" "$old" '"image:text", "text:image"' "$work/two"
write_connector "$work/three.yaml" "$old, {name: speech, positions: none}" \
  '"image:text", "text:image", "speech:text", "image:speech"' "$work/three"
frozen="--set optimizer.frozen=[blocks.*,adapter.image.*,adapter.text.*,key.image.*,key.text.*,prediction.image.*,prediction.text.*,direction.image-text,direction.text-image,query.image-text.*,query.text-image.*]"

# The rows of a retrieval table of the directions that were there before
old_rows() { # checkpoint ranks
  run "$2" eval "$1"
  expect_status 0
  grep -E '^(image -> text|text -> image)' "$work/out"
}

for ranks in 1 2; do
  what="two modalities, $ranks ranks"
  rm -rf "$work/two" "$work/three"
  run $ranks train "$work/two.yaml"
  expect_status 0
  before=$(old_rows "$work/two" $ranks)
  what="a third one, the old frozen, $ranks ranks"
  # shellcheck disable=SC2086
  run $ranks train "$work/three.yaml" --from "$(step_path "$work/two" 12)" $frozen
  expect_status 0
  expect_text "$work/err" "new: parameter/adapter.speech.weight" "began with" "frozen"
  after=$(old_rows "$work/three" $ranks)
  expect_equal "retrieval in the old directions" "$before" "$after"
  grep -q '^speech -> text' "$work/out" || fail "expected a row for speech -> text"
  what="goes on by itself, $ranks ranks"
  # shellcheck disable=SC2086
  run $ranks train "$work/three.yaml" --from "$(step_path "$work/two" 12)" $frozen --set run.steps=16
  expect_status 0
  expect_text "$work/err" "resumed at step 12"
  expect_steps "$work/three" 16
  expect_equal "retrieval in the old directions, later" "$before" "$(old_rows "$work/three" $ranks)"
done

what="not frozen, the old directions change"
rm -rf "$work/three"
run 1 train "$work/three.yaml" --from "$(step_path "$work/two" 12)" --set run.steps=40
expect_status 0
[ "$before" != "$(old_rows "$work/three" 1)" ] || fail "expected other retrieval once the old parameters are trained"

what="the recipe of experiments/glyphs"
sed 's/run\.steps=.*/run.steps=24/' "$(dirname "$0")/../../experiments/glyphs/third.yaml" >"$work/recipe.yaml"
run 1 train "$work/recipe.yaml" --set data.path="$work/data" --set run.directory="$work/recipe" \
  --set run.steps=24 --set run.threads=1 --set model.width=16 --set model.embedding=8 --set model.moe.hidden=24 \
  --set optimizer.batch=8 --set optimizer.rate=0.02
expect_status 0
for stage in two continued added frozen neglected; do expect_steps "$work/recipe/$stage" 24; done
before=$(old_rows "$work/recipe/two" 1)
expect_equal "old directions, frozen" "$before" "$(old_rows "$work/recipe/frozen" 1)"
for stage in continued added neglected; do
  [ "$before" != "$(old_rows "$work/recipe/$stage" 1)" ] || fail "expected other retrieval after stage $stage"
done

what="a pattern that freezes nothing"
rm -rf "$work/three"
run 1 train "$work/three.yaml" --set 'optimizer.frozen=[adapter.smell.*]'
expect_status 1
expect_error "optimizer.frozen" "adapter.smell.*"
what="no such checkpoint"
run 1 train "$work/three.yaml" --from "$work/nowhere"
expect_status 1
expect_error "nowhere"
what="another width"
run 1 train "$work/three.yaml" --from "$(step_path "$work/two" 12)" --set model.width=20
expect_status 1
expect_error "expected float32 [20"
finish
