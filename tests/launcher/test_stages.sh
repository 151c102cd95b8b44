# Stages of one configuration: run in order, killed and stopped in each, resumed to the same bits; records, manifests,
# refusals; stages side by side.
. "$(dirname "$0")/lib.sh"

# A decoder in three stages: the connector of one modality, with the other absent; the blocks; everything.
write_stages() { # file run-directory
  cat >"$1" <<END
run: {directory: $2, seed: 7, log: 5, deadline: 60, threads: 1}
data: {path: $work/data, shuffle: 16, cache: 8,
  modalities: [{name: text, positions: none}, {name: image, positions: none}]}
model: {kind: decoder, vocabulary: 30, width: 16, layers: 2, heads: 2, hidden: 24, moe: {layers: none}}
objective: {importance: 0, load: 0, z: 0}
optimizer: {batch: 8, rate: 0.003, warmup: 2}
checkpoint: {interval: 30, keep: 10, busy: wait, buffers: 1}
evaluate: {batch: 16, at_end: false}
stages:
  - name: align
    set: [run.steps=180, "data.use=[image]", "optimizer.frozen=[blocks.*, embedding.*, output.*, final_norm.*]"]
  - name: expert
    from: align
    set: [run.steps=170, "data.use=[image]", optimizer.rate=0.001, "optimizer.frozen=[embedding.*]"]
  - name: tune
    from: expert
    set: [run.steps=190, "model.moe={layers: all, experts: 2, choose: 2, hidden: 24}"]
END
}

prepare samples=45 vocabulary=30
write_stages "$work/stages.yaml" "$work/run"

contents() { # run-directory: content hashes of all stages
  for stage in align expert tune; do sed -n 's/.*"content":[^"]*"\([0-9a-f]*\)",*$/\1/p' "$1/$stage/stage.json" | sed -n 1p; done | tr '\n' ' '
}

what="three stages"
run 1 train "$work/stages.yaml"
expect_status 0
expect_text "$work/err" "[align] stage 1 of 3" "[expert] stage 2 of 3" "[tune] stage 3 of 3" \
  "[align] trains 208 of" "[tune]   new: parameter/blocks.0.experts.0.in.weight" "[tune] done: 190 steps"
expect_steps "$work/run/align" 180
expect_steps "$work/run/expert" 170
expect_steps "$work/run/tune" 190
whole=$(contents "$work/run")
expect_equal "hash of the last checkpoint" "$(content "$(step_path "$work/run/align" 180)")" "$(echo "$whole" | cut -d ' ' -f 1)"

what="manifests"
expect_text "$work/run/align/manifest.json" '"stage":	"align"' '"began":	null' '"name":	"connector.image.first"' '"trained":	208'
expect_text "$work/run/tune/manifest.json" "$(step_path "$work/run/expert" 170)" '"parameter/connector.text.first.weight"' \
  '"parameter/blocks.1.router.weight"' '"optimizer_state"'
grep -q 'parameter/embedding' "$work/run/tune/manifest.json" && fail "expected the embedding to be taken over"
grep -q 'connector.text' "$work/run/align/manifest.json" && fail "expected no connector of a modality that takes no part"

what="each stage has an order of its own"
for pair in align:0 expert:1 tune:2; do
  stage=${pair%:*}
  last=$(ls -d "$work/run/$stage/checkpoints"/step-* | tail -1)
  grep -q "\\\\*\"stage\\\\*\":\\\\*\"${pair#*:}\\\\*\"" "$last/manifest.json" || fail "expected the order of stage ${pair#*:} in $stage"
done

what="stages beside one another have one order, whatever else the file holds"
write_stages "$work/beside.yaml" "$work/beside"
sed -i '/^stages:/,$d' "$work/beside.yaml"
cat >>"$work/beside.yaml" <<END
stages:
  - {name: first, set: [run.steps=1]}
  - {name: left, from: first, set: [run.steps=2]}
  - {name: right, from: first, set: [run.steps=2]}
END
run 1 train "$work/beside.yaml"
expect_status 0
losses() { grep -o '"loss":[^,]*,"next_token"' "$work/beside/$1/metrics.jsonl" | tr '\n' ' '; }
expect_equal "losses" "$(losses left)" "$(losses right)"

what="all of them done"
run 1 train "$work/stages.yaml"
expect_status 0
expect_text "$work/err" "stage 'align' is done since step 180" "stage 'tune' is done since step 190"
grep -q 'stage 1 of 3' "$work/err" && fail "expected nothing to run"

# Stopped or killed when the metrics of a stage have so many lines, then run to the end
disturbed() { # ranks stage lines signal status
  what="$2 after $3 steps: $4, $1 ranks"
  rm -rf "$work/run"
  start "$1" train "$work/stages.yaml"
  until_true 60 has_lines "$work/run/$2/metrics.jsonl" "$3" || fail "expected step $3 of $2"
  kill -"$4" "$(pid 0)"
  wait_job
  [ "$5" = any ] || expect_status "$5"
  run "$1" train "$work/stages.yaml"
  expect_status 0
  expect_text "$work/err" "[$2] resumed at step"
  [ "$2" = align ] || expect_text "$work/run/$2/manifest.json" '"from":	"' '"new":'
  expect_equal "contents" "$whole" "$(contents "$work/run")"
}
for stage in align expert tune; do
  disturbed 1 $stage 5 USR1 75
  disturbed 1 $stage 70 KILL any
done

what="asked to stop between two stages"
rm -rf "$work/run"
ANTIPHON_FAULT_FILE="1:sleep=100:align/stage.json"
export ANTIPHON_FAULT_FILE
start 1 train "$work/stages.yaml"
until_true 60 has_lines "$work/run/align/metrics.jsonl" 180 || fail "expected 180 steps of align"
kill -TERM "$(pid 0)"
wait_job
unset ANTIPHON_FAULT_FILE
expect_status 75
expect_text "$work/err" "stopped on request between stages"
run 1 train "$work/stages.yaml"
expect_status 0
expect_equal "contents" "$whole" "$(contents "$work/run")"

what="killed between the end of a stage and its record"
rm -rf "$work/run"
fault 2 exit align/stage.json 1 train "$work/stages.yaml"
run 1 train "$work/stages.yaml"
expect_status 0
expect_equal "contents" "$whole" "$(contents "$work/run")"

refused() { # words... ; the configuration is $work/other.yaml
  run 1 train "$work/other.yaml"
  expect_status 1
  expect_error "$@"
}
what="a changed stage that is done"
sed 's/optimizer.rate=0.001/optimizer.rate=0.002/' "$work/stages.yaml" >"$work/other.yaml"
refused "stage 'expert'" "rate: 0.001" "rate: 0.002" "remove $work/run/expert"
what="changes that do not matter"
run 1 train "$work/stages.yaml" --set run.threads=2 --set checkpoint.keep=4 --set data.threads=2 \
  --set parallel.overlap=always --set parallel.bucket=8 --set parallel.chunks=2
expect_status 0
what="a source trained anew"
rm -rf "$work/run/align"
run 1 train "$work/stages.yaml"
expect_status 1
expect_error "stage 'expert'" "'align', which it began from, is not"
what="refusals before anything starts"
rm -rf "$work/run"
sed 's/from: align/from: nowhere/' "$work/stages.yaml" >"$work/other.yaml"
refused "other.yaml:" "'expert' names the source 'nowhere': there is no such stage"
sed 's/from: align/from: tune/' "$work/stages.yaml" >"$work/other.yaml"
refused "'expert' names the source 'tune': it is not done before"
sed 's/from: align/from: align@best/' "$work/stages.yaml" >"$work/other.yaml"
refused "it has no checkpoint.keep_best"
sed 's/name: expert/name: align/' "$work/stages.yaml" >"$work/other.yaml"
refused "stages.1.name" "there are two stages 'align'"
sed 's/name: expert/name: "a\/b"/' "$work/stages.yaml" >"$work/other.yaml"
refused "stages.1.name" "got 'a/b'"
sed 's/run.steps=190/optimizer.batch=0/' "$work/stages.yaml" >"$work/other.yaml"
refused "stage 'tune'" "--set optimizer.batch=0" "expected 1 to"
sed 's/run.steps=190/data.train=elsewhere/' "$work/stages.yaml" >"$work/other.yaml"
refused "stage 'tune'" "elsewhere"
sed 's/run.steps=190/run.directory=x/' "$work/stages.yaml" >"$work/other.yaml"
refused "'tune' sets run.directory=x"
[ -e "$work/run" ] && fail "expected no run directory after refusals"
run 1 train "$work/stages.yaml" --from "$work/nowhere"
expect_status 2
run 1 train "$work/stages.yaml" --resume "$work/nowhere"
expect_status 2

# ---- side by side ----

write_pair() { # file run-directory training-split-of-the-second
  sed -e "s|directory: [^,]*,|directory: $2,|" -e '/^stages:/,$d' "$work/stages.yaml" >"$1"
  cat >>"$1" <<END
stages:
  - {name: first, group: experts, from: $base, set: [run.steps=180, "data.use=[image]"]}
  - {name: second, group: experts, from: $base, set: [run.steps=600, optimizer.rate=0.001, data.train=$3]}
END
}
pair() { # run-directory: contents of both
  content "$(step_path "$1/first" 180)"
  content "$(step_path "$1/second" 600)"
}
what="one after another on one rank"
run 1 train "$work/stages.yaml" --set run.directory="$work/base"
base=$(step_path "$work/base/align" 180)
write_pair "$work/pair.yaml" "$work/single" train
run 1 train "$work/pair.yaml"
expect_status 0
alone=$(pair "$work/single")
what="side by side on two ranks"
write_pair "$work/pair.yaml" "$work/both" train
run 2 train "$work/pair.yaml"
expect_status 0
expect_text "$work/err" "[first] 1 rank" "[second] 1 rank"
expect_equal "contents" "$alone" "$(pair "$work/both")"
what="side by side, stopped"
rm -rf "$work/both"
start 2 train "$work/pair.yaml"
until_true 60 has_lines "$work/both/second/metrics.jsonl" 20 || fail "expected 20 steps of the second"
kill -USR1 "$(pid mpirun)"
wait_job
expect_status 75
run 2 train "$work/pair.yaml"
expect_status 0
grep -q -e "\[first\] resumed at step" -e "\[second\] resumed at step" "$work/err" || fail "expected one of them to go on inside"
expect_equal "contents" "$alone" "$(pair "$work/both")"
what="an error in one of them"
"$MAKE_SET" directory="$work/data/spoilt" samples=45 vocabulary=30 nan=text || exit 1
write_pair "$work/pair.yaml" "$work/failing" spoilt
run 2 train "$work/pair.yaml"
expect_status 1
expect_error "stage 'second'" "rank 1"
finish
