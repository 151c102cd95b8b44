# MoExtend's recipe in one file: align, router-only tuning, extension, tuning; killed and resumed to the same bits; the
# choice of layers and the extended tensors are the same on any layout; old tensors keep their bits.
. "$(dirname "$0")/lib.sh"

# The base has seen images; `new` has speech too.
"$MAKE_SET" directory="$work/data/old" samples=48 shards=1 vocabulary=30 image=12 text=0 &&
  "$MAKE_SET" directory="$work/data/old_held_out" samples=20 shards=1 first=900 vocabulary=30 image=12 text=0 &&
  "$MAKE_SET" directory="$work/data/new" samples=48 shards=1 first=100 vocabulary=30 image=12 text=0 speech=7 &&
  "$MAKE_SET" directory="$work/data/new_held_out" samples=24 shards=1 first=800 vocabulary=30 image=12 text=0 speech=7 || exit 1
cat >"$work/recipe.yaml" <<END_OF_FILE
run: {directory: $work/run, seed: 7, steps: 12, log: 50, deadline: 60, threads: 1}
data: {path: $work/data, train: new, validation: new_held_out, shuffle: 16, cache: 8,
  modalities: [{name: image, positions: none}, {name: speech, positions: none}]}
model: {kind: decoder, vocabulary: 30, width: 16, layers: 5, heads: 2, hidden: 24,
  moe: {layers: "0,1,3,4", layer_experts: [3, 4, 3, 5], choose: 2, hidden: 24, gate: renormalised, noise: 0}}
objective: {importance: 0, load: 0, z: 0}
optimizer: {batch: 8, rate: 0.003, warmup: 2}
checkpoint: {interval: 4, keep: 10, busy: wait, buffers: 1}
evaluate: {batch: 16, at_end: false}
stages:
  - {name: base, set: [data.train=old, data.validation=old_held_out, "data.use=[image]"]}
  - {name: align, from: base, set: ["optimizer.trained=[connector.speech.*]"]}
  - {name: route, from: align, set: [optimizer.rate=0.05, "optimizer.trained=[blocks.*.router.*]"]}
  - name: extend
    kind: extend
    from: align
    extend: {tuned: route, split: new_held_out, share: '0.5'}
    set: ["evaluate.forgetting=[old_held_out]"]
  - name: tune
    from: extend
    set: [model.moe.calibration=add, objective.balance=0.001, objective.balance_shares=all,
      "optimizer.trained=[added]", "evaluate.forgetting=[old_held_out, new_held_out]"]
END_OF_FILE

value() { # file key: of the first line that has it
  sed -n "s/.*\"$2\":[[:space:]]*\"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$1" | sed -n 1p
}

layers() { # extend.json: what was counted, measured and chosen
  sed -n '/"layers"/,/"new"/p' "$1"
}

contents() { # run-directory
  for stage in base align route extend tune; do value "$1/$stage/stage.json" content; done | tr '\n' ' '
}

what="the recipe"
run 1 train "$work/recipe.yaml"
expect_status 0
expect_text "$work/err" "[extend] extended 2 of 4 MoE layers" "[tune] trains 2" "[tune]   new: parameter/blocks." \
  "forgetting, old_held_out: loss" "forgetting, new_held_out: tokens at new experts"
whole=$(contents "$work/run")
expect_equal "layers extended" 2 "$(grep -c '"extended":.*true' "$work/run/extend/extend.json")"
expect_equal "new tensors" 3 "$(grep '"new"' "$work/run/extend/extend.json" | grep -o 'blocks\.[0-9]*\.\(experts\|router\)' | sort | uniq -c | awk '{n += $1} END {print n / 2}')"
grep -q '"adam_' "$work/run/extend/checkpoints/step-00000000/manifest.json" && fail "expected no optimizer state"
before=$(sed -n '/"old"/,$s/.*parameter\/embedding.weight":[^"]*"\([0-9a-f]*\)".*/\1/p' "$work/run/extend/extend.json")
expect_equal "the embedding before and after" "$before $before" \
  "$(sed -n '/"embedding"/,/}/s/.*"frozen_\(begun\|now\)":[^"]*"\([0-9a-f]*\)".*/\2/p' "$work/run/tune/manifest.json" | tr '\n' ' ' | sed 's/ $//')"
for moment in begun now; do
  sed -n "s/.*\"frozen_$moment\":[^\"]*\"\([0-9a-f]*\)\".*/\1/p" "$work/run/tune/manifest.json" >"$work/frozen.$moment"
done
[ "$(lines "$work/frozen.begun")" -gt 8 ] || fail "expected hashes of the frozen groups"
expect_same_file "hashes of what is frozen" "$work/frozen.begun" "$work/frozen.now"

what="the figures of the report are those of eval"
"$ANTIPHON" eval "$work/run/tune" "$work/data" --split new_held_out --json >"$work/eval.json" 2>"$work/err" || fail "expected eval to end well"
for pair in next_token:after new_experts:all; do
  expect_equal "${pair%:*}" "$(sed -n "s/.*\"${pair%:*}\":\([-+.e0-9]*\).*/\1/p" "$work/eval.json" | awk '{printf "%.6f", $1}')" \
    "$(sed -n '/"new_held_out"/,$p' "$work/run/tune/forgetting.json" | sed -n "s/.*\"${pair#*:}\":[[:space:]]*\([-+.e0-9]*\).*/\1/p" | awk '{printf "%.6f", $1}')"
done

"$ANTIPHON" eval "$work/run/tune" "$work/data" --split old_held_out --set data.use=[image] --json >"$work/eval.json" 2>"$work/err" || fail "expected eval to end well"
expect_equal "loss without the new modality" "$(sed -n '/"old_held_out"/,/}/s/.*"after":[[:space:]]*\([-+.e0-9]*\).*/\1/p' "$work/run/tune/forgetting.json" | awk '{printf "%.6f", $1}')" \
  "$(sed -n 's/.*"next_token":\([-+.e0-9]*\).*/\1/p' "$work/eval.json" | awk '{printf "%.6f", $1}')"

# The same two checkpoints, counted and extended elsewhere
for layout in "1 1" "2 1" "2 2"; do
  what="extension on ${layout% *} ranks, experts on ${layout#* }"
  rm -rf "$work/extended"
  run "${layout% *}" extend "$work/run/align" --tuned "$work/run/route" -o "$work/extended" --set parallel.experts="${layout#* }"
  expect_status 0
  layers "$work/run/extend/extend.json" >"$work/layers.expected"
  layers "$work/extended/extend.json" >"$work/layers.got"
  expect_same_file "what was counted and chosen" "$work/layers.expected" "$work/layers.got"
  expect_equal "the extended tensors" "$(value "$work/run/extend/stage.json" content)" "$(content "$work/extended/step-00000000")"
done

what="two ways to tune, side by side"
sed 's|  - name: tune|  - {name: other, group: both, from: extend, set: [optimizer.rate=0.01, "optimizer.trained=[added]"]}\n&\n    group: both|' \
  "$work/recipe.yaml" >"$work/both.yaml"
for again in 0 1; do
  run 2 train "$work/both.yaml" --set run.directory="$work/both"
  expect_status 0
  [ "$again" = 0 ] || expect_text "$work/err" "stage 'other' is done"
  [ "$again" = 1 ] && grep -q trains "$work/err" && fail "expected nothing to be trained again"
done

# Killed in one stage, stopped in another, killed while the extension is written
disturbed() { # stage signal status
  what="$1: $2"
  rm -rf "$work/run"
  start 1 train "$work/recipe.yaml"
  until_true 60 has_lines "$work/run/$1/metrics.jsonl" 5 || fail "expected step 5 of $1"
  kill -"$2" "$(pid 0)"
  wait_job
  [ "$3" = any ] || expect_status "$3"
  run 1 train "$work/recipe.yaml"
  expect_status 0
  expect_equal "contents" "$whole" "$(contents "$work/run")"
}
disturbed route KILL any
disturbed tune USR1 75
what="killed while the extension is written"
rm -rf "$work/run"
fault 3 exit extend/checkpoints 1 train "$work/recipe.yaml"
[ "$status" = 0 ] && fail "expected the run to be killed"
run 1 train "$work/recipe.yaml"
expect_status 0
expect_equal "contents" "$whole" "$(contents "$work/run")"

what="a copy under the last choice changes no bit on what was held out"
sed -i -e "s/share: '0.5'/layers: all, init: copy_below/" -e 's/\[old_held_out\]/[new_held_out]/' "$work/recipe.yaml"
rm -rf "$work/run/extend" "$work/run/tune"
run 1 train "$work/recipe.yaml"
expect_status 0
expect_equal "layers extended" 4 "$(grep -c '"extended":.*true' "$work/run/extend/extend.json")"
sed -n '/"splits"/,$p' "$work/run/extend/forgetting.json" >"$work/splits"
expect_text "$work/splits" '"before":	3.'
expect_equal "loss on new_held_out" "$(value "$work/splits" before)" "$(value "$work/splits" after)"
expect_equal "tokens at new experts" 0 "$(value "$work/splits" all)"

refused() { # words... --
  expect_status 1
  expect_error "$@"
  [ ! -e "$work/extended/step-00000000" ] || fail "expected nothing to be written"
}
what="refusals"
rm -rf "$work/extended"
for case in \
  "$work/run/align|--tuned $work/run/base|not the same model" \
  "$work/run/align|--tuned $(step_path "$work/run/align" 4)|routers alone may be trained" \
  "$work/run/base|--tuned $work/run/base --share 0.2|is no layer" \
  "$work/run/align|--layers d|must be given" \
  "$work/run/align|--layers 7|expected d, lowest" \
  "$work/run/tune|--layers all|added experts already" \
  "$work/run/align|--tuned $work/run/align --split none|none"; do
  what="refused: $case"
  # shellcheck disable=SC2046
  run 1 extend $(echo "$case" | cut -d '|' -f 1) $(echo "$case" | cut -d '|' -f 2) -o "$work/extended"
  refused "$(echo "$case" | cut -d '|' -f 3)"
done
what="refused: another extension than the one that is done"
sed -i 's/init: copy_below/init: zero/' "$work/recipe.yaml"
run 1 train "$work/recipe.yaml"
expect_status 1
expect_error "begun as another extension"

what="bad stages"
bad() { # what a stage of kind extend lacks, words
  sed "s|kind: extend|&|; $1" "$work/recipe.yaml" >"$work/other.yaml"
  run 1 train "$work/other.yaml" --set run.directory="$work/other"
  expect_status 1
  expect_error "$2"
  [ ! -e "$work/other/base" ] || fail "expected nothing to be run"
}
bad "s/tuned: route, split/layers: d, split/; s/layers: all, //" "extend.tuned, which is not given"
bad "s/init: zero/share: '1.5'/" "extend.share is no decimal"
bad "s/init: zero/margin: 0/" "extend.margin is not above 0"
bad "/kind: extend/{n;d;}" "which says what is extended"
bad 's/"optimizer.trained=.added."/"model.moe.added=[1, 0, 0, 0]"/' "leave model.moe.added empty"
what="patterns that name nothing"
run 1 train "$work/recipe.yaml" --set stages=[] --set run.directory="$work/other" --set optimizer.trained=[blocks.*.nothing]
expect_status 1
expect_error "optimizer.trained.0: no parameter's name matches 'blocks.*.nothing'"

# The file of experiments/moextend with other sizes, from an old model of those
what="the recipe of experiments/moextend"
"$MAKE_SET" directory="$work/data/image_held_out" samples=12 shards=1 vocabulary=30 image=12 text=0 || exit 1
for split in video_captions video_instructions video_held_out; do cp -r "$work/data/new" "$work/data/$split"; done
sed -e 's/video/speech/g; /{name: speech, .* # the new one/d; s/marks in prompts.*//; s/, speech_held_out\]/]/' \
  -e "s|data/moextend|$work/data|; s|runs/old/step-00010000|$work/old/checkpoints/step-00000002|" -e "s/speech_\(captions\|instructions\|held_out\)/video_\1/" \
  "$(dirname "$0")/../../experiments/moextend/moextend.yaml" >"$work/published.yaml"
small="--set run.precision=float32 --set run.steps=2 --set run.threads=1 --set parallel.experts=1 --set model.vocabulary=30
  --set model.width=16 --set model.layers=4 --set model.heads=2 --set model.hidden=24 --set model.moe.hidden=24 --set data.cache=8"
# shellcheck disable=SC2086
run 1 train "$work/published.yaml" $small --set stages=[] --set run.directory="$work/old" --set data.train=image_held_out \
  --set data.use=[image] --set checkpoint.contents=all
expect_status 0
sed -i 's/run.steps=1000/run.steps=3/; s/batch=256/batch=8/' "$work/published.yaml"
# shellcheck disable=SC2086
run 2 train "$work/published.yaml" $small --set run.directory="$work/published" --set parallel.experts=2 --set optimizer.batch=8
expect_status 0
expect_text "$work/err" "[extend] extended 1 of 2 MoE layers" "[tune] done: 2 steps" "[tune] forgetting, image_held_out: loss"

# A tower: its quality is recall, its tokens choose one expert
rm -rf "$work/run" "$work/extended"
prepare samples=40
cat >>"$work/config.yaml" <<END_OF_FILE
stages:
  - {name: base, set: [run.steps=6]}
  - {name: route, from: base, set: [run.steps=6, optimizer.rate=0.1, "optimizer.trained=[blocks.*.router.*]"]}
  - {name: extend, kind: extend, from: base, extend: {tuned: route, share: '0.5'}}
  - {name: tune, from: extend, set: [run.steps=6, optimizer.rate=0.1, "optimizer.trained=[added]", "evaluate.forgetting=[validation]"]}
END_OF_FILE
what="a tower"
run 2 train "$work/config.yaml" --set parallel.experts=2
expect_status 0
expect_text "$work/err" "[extend] extended 1 of 2 MoE layers" "[tune] forgetting, validation: mean R@1 in %"
"$ANTIPHON" eval "$work/run/tune" >"$work/table" 2>"$work/err" || fail "expected eval to end well"
sed -n '/"splits"/,$p' "$work/run/tune/forgetting.json" >"$work/splits"
expect_equal "tokens at new experts" "$(value "$work/splits" all | awk '{printf "%.2f", 100 * $1}')" \
  "$(sed -n 's/^tokens at new experts: \([0-9.]*\) %.*/\1/p' "$work/table")"
expect_equal "mean R@1" "$(value "$work/splits" after | awk '{printf "%.2f", 100 * $1}')" \
  "$(awk '$1 ~ /->/ || $2 == "->" {for (i = 1; i <= NF; i++) if ($i ~ /%/) {sum += $i; n++; break}} END {printf "%.2f", sum / n}' "$work/table")"
finish
