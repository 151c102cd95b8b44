# Weights in and out by the command: a published decoder is imported, trained on, evaluated and exported again.
. "$(dirname "$0")/lib.sh"
published=$(dirname "$0")/../golden/published

prepare samples=24 absent=5 vocabulary=61
what="import"
note "$what"
run 1 import "$published/llama" --config "$work/decoder.yaml" -o "$work/imported"
expect_status 0
run 1 check "$work/imported/step-00000000"
expect_status 0
run 1 check "$work/decoder.yaml"
expect_status 0
run 1 import "$published/llama" --config "$work/other.yaml" -o "$work/imported"
expect_status 1
expect_text "$work/err" "is there already"
run 1 import "$published/llama" -o "$work/elsewhere"
expect_status 2
run 2 import "$published/llama" --config "$work/other.yaml" -o "$work/elsewhere"
expect_status 1
expect_text "$work/err" "import runs on one rank"
[ -e "$work/other.yaml" ] && fail "a refused import left a configuration"

what="training begins with imported weights"
note "$what"
sed -i 's/modalities: .*/modalities: [{name: image, positions: none}, {name: text, positions: none}]/' "$work/decoder.yaml"
settings="--set data.path=$work/data --set data.validation=train --set run.directory=$work/run --set run.steps=4 --set optimizer.batch=4
  --set run.threads=1 --set evaluate.at_end=true --set evaluate.batch=8"
run 2 train "$work/decoder.yaml" --from "$work/imported/step-00000000" $settings
expect_status 0
expect_text "$work/err" "began with 15 tensors of"
expect_text "$work/err" "; 8 are new" # two connectors and the standardisation of their latents
expect_text "$work/err" "response tokens of train"
run 1 eval "$work/run"
expect_status 0
expect_text "$work/out" "response tokens"

run 1 eval "$work/run" --generate 5
expect_status 0
[ "$(grep -c '^{"id":[0-9]*,"tokens":\[[0-9,]*\]}$' "$work/out")" = 24 ] || fail "expected a line of tokens a sample"
cp "$work/out" "$work/greedy"
run 1 eval "$work/run" --generate 5 --temperature 3
expect_status 0
cmp -s "$work/out" "$work/greedy" && fail "drawn tokens are the likeliest"
run 1 eval "$work/run" --generate none
expect_status 2

what="export"
note "$what"
run 1 export "$work/run/checkpoints/step-00000004" -o "$work/out.hf" --dtype bfloat16
expect_status 0
[ -s "$work/out.hf/model.safetensors" ] || fail "no weights"
run 1 import "$work/out.hf" --config "$work/again.yaml" -o "$work/again"
expect_status 0
run 1 export "$work/again/step-00000000" -o "$work/again.hf" --dtype bfloat16
expect_same_file "weights" "$work/out.hf/model.safetensors" "$work/again.hf/model.safetensors"
run 2 train "$work/again.yaml" --from "$work/again/step-00000000" --set run.directory="$work/more" --set run.steps=1
expect_status 0
expect_text "$work/err" "; 0 are new"
run 1 export "$work/run/checkpoints/step-00000004" -o "$work/out.hf"
expect_status 1
run 1 export "$work/run/checkpoints/step-00000004" -o "$work/out.8" --dtype int8
expect_status 2

what="what shards hold must fit the decoder"
note "$what"
rm -rf "$work/data"
prepare samples=24 vocabulary=200
for ranks in 1 2; do
  run $ranks train "$work/decoder.yaml" $settings --set run.directory="$work/run.$ranks"
  expect_status 1
  expect_text "$work/err" "in a vocabulary of 61"
  [ -e "$work/run.$ranks" ] && fail "a refused run left a directory"
done
finish
