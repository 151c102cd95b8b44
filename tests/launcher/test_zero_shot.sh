# eval --zero-shot: a set whose result is known by hand, on 1 and 2 ranks; and what is refused.
. "$(dirname "$0")/lib.sh"

# Six classes far apart, two prompts of each. Of 60 images 6 carry the label of another class and 10 none: of the
# 50 that are classified 45 are right once the model has learned to tell the classes.
"$MAKE_SET" directory="$work/data/train" classes=6 samples=96 || exit 1
"$MAKE_SET" directory="$work/data/validation" classes=6 samples=60 shards=1 first=5000 || exit 1
"$MAKE_SET" directory="$work/data/pictures" classes=6 samples=60 shards=2 first=6000 text=0 wrong=6 unlabelled=6 || exit 1
"$MAKE_SET" directory="$work/prompts" classes=6 samples=12 shards=1 first=7000 image=0 || exit 1
write_config "$work/config.yaml" "$work/data" "$work/run"
run 1 train "$work/config.yaml" --set run.steps=150 --set optimizer.rate=0.01
expect_status 0

classify() { # RANKS ARGUMENTS...
  ranks=$1
  shift
  run "$ranks" eval "$work/run" --split pictures --zero-shot "$work/prompts" "$@"
}

for ranks in 1 2; do
  what="a table, $ranks ranks"
  classify $ranks
  expect_status 0
  expect_text "$work/out" "image by 12 prompts of text for 6 classes: 50 items, 10 without a label left out"
  # 45 of 50: Wilson's interval is 78.64 to 95.65
  grep -Eq '^top-1 +90.00% +78.64% - +95.65% +16.67%$' "$work/out" || fail "expected 90 % at top-1: $(cat "$work/out")"
  grep -Eq '^top-5 +[0-9.]+% .* +83.33%$' "$work/out" || fail "expected a row for top-5"
  cp "$work/out" "$work/table.$ranks"
done
expect_same_file "tables of 1 and 2 ranks" "$work/table.1" "$work/table.2"

what="JSON"
classify 1 --json
expect_status 0
expect_equal "lines" 1 "$(lines "$work/out")"
expect_text "$work/out" '{"step":150,"zero_shot":{"modality":"image","prompts":{"modality":"text","count":12},"classes":6' \
  '"items":50,"unlabelled":10,"absent":0,"top1":{"hits":45,"share":0.9,"interval":[0.786' '"top5":{"hits":'

what="a split of DATA by its name, and a path with a slash at its end"
mv "$work/prompts" "$work/data/prompts"
run 1 eval "$work/run" "$work/data" --split pictures --zero-shot prompts
expect_status 0
expect_same_file "the table" "$work/table.1" "$work/out"
run 1 eval "$work/run" --split pictures --zero-shot "$work/data/prompts/"
expect_status 0
expect_same_file "the table" "$work/table.1" "$work/out"

what="the other way round"
"$MAKE_SET" directory="$work/data/names" classes=6 samples=30 shards=1 first=8000 image=0 || exit 1
"$MAKE_SET" directory="$work/data/drawings" classes=6 samples=6 shards=1 first=9000 text=0 || exit 1
run 1 eval "$work/run" --split names --zero-shot drawings --items text --prompts image
expect_status 0
expect_text "$work/out" "text by 6 prompts of image for 6 classes: 30 items"

# ---- a connector ----

what="a connector"
cat >"$work/connector.yaml" <<END
run: {directory: $work/connector, seed: 7, steps: 200, log: 50, deadline: 60, threads: 1}
data: {path: $work/data, shuffle: 16, cache: 8, modalities: [{name: image, positions: none}, {name: text, positions: none}]}
model: {kind: connector, width: 16, embedding: 8, activation: gelu, moe: {experts: 4, choose: 2, hidden: 24, noise: 0}}
objective: {directions: ["image:text"], importance: 0, load: 0, z: 0}
optimizer: {batch: 8, rate: 0.01}
checkpoint: {interval: 0}
evaluate: {batch: 16, at_end: false}
END
run 1 train "$work/connector.yaml"
expect_status 0
run 2 eval "$work/connector" --split pictures --zero-shot prompts
expect_status 0
grep -Eq '^top-1 +90.00%' "$work/out" || fail "expected 90 % at top-1: $(cat "$work/out")"
what="a direction that is not there"
run 2 eval "$work/connector" --split names --zero-shot drawings --items text --prompts image
expect_status 1
expect_error "the connector has no direction text:image"

# ---- what is refused ----

refuse() { # NAME WORDS -- ARGUMENTS: on 2 ranks, so that all of them end
  what=$1 words=$2
  shift 3
  run 2 eval "$work/run" "$@"
  expect_status 1
  expect_error "$words"
}
"$MAKE_SET" directory="$work/data/plain" samples=12 shards=1 first=100 || exit 1
"$MAKE_SET" directory="$work/data/some" classes=6 samples=12 shards=1 first=100 image=0 unlabelled=12 || exit 1
"$MAKE_SET" directory="$work/data/four" classes=4 samples=8 shards=1 first=100 image=0 || exit 1
"$MAKE_SET" directory="$work/data/hole" classes=6 samples=12 shards=1 first=100 image=0 empty=2 || exit 1
"$MAKE_SET" directory="$work/data/strange" classes=6 samples=12 shards=1 first=100 text=0 unknown=1 || exit 1
"$MAKE_SET" directory="$work/data/wide" classes=6 samples=12 shards=1 first=100 text=8 || exit 1
refuse "prompts without labels" "sample 100 of $work/data/plain has no label" -- --split pictures --zero-shot plain
refuse "a prompt without a label" "sample 111 of $work/data/some has no label" -- --split pictures --zero-shot some
refuse "items without labels" "no sample of $work/data/plain has a label" -- --split plain --zero-shot prompts
refuse "a class without prompts" "is of class 4, for which $work/data/four has no prompt" -- \
  --split pictures --zero-shot four
refuse "a label of no class" "sample 111 of $work/data/strange is of class 1000" -- --split strange --zero-shot prompts
refuse "a class whose prompts are empty" "class 2 of $work/data/hole has no prompt: all its samples are empty" -- \
  --split pictures --zero-shot hole
refuse "prompts of another width" "'text' in $work/data/wide is 8 wide, the model's is 9" -- \
  --split pictures --zero-shot wide
refuse "no such split" "nowhere" -- --split pictures --zero-shot "$work/nowhere"
refuse "no such modality" "--prompts: the model has no modality 'speech'; it has: image, text" -- \
  --split pictures --zero-shot prompts --prompts speech
refuse "items and prompts of one modality" "items and prompts are of one modality, 'text'" -- \
  --split pictures --zero-shot prompts --items text
what="an option of zero-shot without it"
run 1 eval "$work/run" --items text
expect_status 2
finish
