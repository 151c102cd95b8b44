# The recipe of experiments/unimoe from end to end, in small: its file with other sizes, on two ranks, stages of a group
# side by side; and again on one, where they come one after another.
. "$(dirname "$0")/lib.sh"
recipe=$(dirname "$0")/../../experiments/unimoe/uni_moe.yaml

for split in image_captions speech_captions image_instructions speech_instructions mixture; do
  case $split in image*) widths="image=12 text=0" ;; speech*) widths="image=0 text=0 speech=7 carrier=speech" ;; *) widths="text=0 speech=7 absent=3" ;; esac
  # shellcheck disable=SC2086
  "$MAKE_SET" directory="$work/data/$split" samples=70 vocabulary=40 $widths || exit 1
done
# A base decoder, as an import would leave it: of the same sizes, with no connector that any stage takes over.
small="--set data.path=$work/data --set run.directory=$work/run --set run.precision=float32 --set run.steps=3 --set run.threads=1
  --set data.cache=8 --set model.vocabulary=40 --set model.width=16 --set model.layers=4 --set model.heads=2
  --set model.hidden=24 --set model.moe.hidden=24"
sed -e "s|runs/imported/step-00000000|$work/base/checkpoints/step-00000001|" -e 's/rank: 64/rank: 2/; s/rank: 8/rank: 2/g' \
  "$recipe" >"$work/recipe.yaml"
what="a base"
# shellcheck disable=SC2086
run 1 train "$work/recipe.yaml" $small --set stages=[] --set run.directory="$work/base" --set run.steps=1 \
  --set data.train=image_captions --set data.use=[image]
expect_status 0
for ranks in 2 1; do
  what="the recipe on $ranks ranks"
  rm -rf "$work/run"
  # shellcheck disable=SC2086
  run $ranks train "$work/recipe.yaml" $small
  expect_status 0
  expect_text "$work/err" "[align_image] trains" "[align_speech] trains" "8 adapters are merged" "[tune] trains" "[tune] done: 3 steps"
  expect_text "$work/run/tune/manifest.json" '"parameter/blocks.3.experts.3.out.lora_b.weight"'
  # neither stage 1 nor 2 has a connector of the other modality, the last one has both
  grep -q 'connector.speech' "$work/run/expert_image/manifest.json" && fail "expected no connector of speech in expert_image"
  expect_text "$work/run/tune/manifest.json" '"connector.image.first"' '"connector.speech.second"'
  case $ranks in
    2) expect_text "$work/err" "[expert_speech] 1 rank," ;;
    1) expect_text "$work/err" "[expert_speech] stage 4 of 6" ;;
  esac
done
finish
