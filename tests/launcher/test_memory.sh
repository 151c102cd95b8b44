# What the plan says of memory is what the process takes, within 10 %, where activations dominate.
. "$(dirname "$0")/lib.sh"

measure() { # RANKS [--set ...]
  ranks=$1
  shift
  rm -rf "$work/run"
  run "$ranks" train "$work/config.yaml" "$@"
  expect_status 0
  planned=$(sed -n 's/.*planned memory of rank 0: \([0-9.]*\) MiB.*/\1/p' "$work/err")
  peak=$(sed -n 's/.*peak memory of rank 0: \([0-9.]*\) MiB.*/\1/p' "$work/err")
  note "$what: planned $planned MiB, peak $peak MiB"
  awk -v a="$planned" -v b="$peak" 'BEGIN {exit !(a > 300 && b > 0.9 * a && b < 1.1 * a)}' ||
    fail "expected a peak within 10 % of the planned $planned MiB, got $peak MiB"
}

prepare samples=256 shards=1 rows=64 image=64 text=64
sets="--set run.steps=3 --set optimizer.batch=128 --set model.width=128 --set model.heads=4 --set model.hidden=256
  --set model.layers=4 --set data.modalities.image.length=64 --set data.modalities.text.length=64"
what="one rank"
measure 1 $sets
what="one rank, top 2, capacity"
measure 1 $sets --set model.moe.choose=2 --set model.moe.dispatch=capacity
what="recomputed"
measure 1 $sets --set model.moe.choose=2 --set model.recompute=true --set optimizer.batch=256
recomputed=$planned
what="kept, the same batch"
measure 1 $sets --set model.moe.choose=2 --set optimizer.batch=256
awk -v a="$recomputed" -v b="$planned" 'BEGIN {exit !(a < 0.6 * b)}' ||
  fail "expected recomputation to save at least 40 % of $planned MiB, got $recomputed MiB"
what="bfloat16"
measure 1 $sets --set model.moe.choose=2 --set optimizer.batch=256 --set run.precision=bfloat16
awk -v a="$planned" -v b="$recomputed" 'BEGIN {exit !(a > b)}' ||
  fail "expected bfloat16 alone to save less than recomputation"
what="adapters over a frozen base"
measure 1 $sets --set model.width=256 --set model.hidden=1024 --set model.moe.experts=16 --set optimizer.batch=32 \
  --set 'model.lora=[{parameters: blocks.*, rank: 8, dropout: 0.1}]' \
  --set "optimizer.frozen=['*norm*','connector.*','head.*']"
grep -o -e '^[0-9.]* M parameters' -e '[0-9.]* M frozen' -e 'parameters and optimizer [0-9.]*' "$work/err" |
  tr -dc '0-9.\n' | tr '\n' ' ' >"$work/arithmetic"
note "$what: M parameters, M of them frozen, MiB: $(cat "$work/arithmetic")"
awk '{want = ($1 + 3 * ($1 - $2)) * 4e6 / 1048576; exit !(NF == 3 && $2 > 20 * ($1 - $2) && $3 > 0.99 * want && $3 < 1.01 * want)}' \
  "$work/arithmetic" || fail "expected 4 bytes a parameter and 12 more for a trained one"
what="two ranks"
measure 2 $sets --set parallel.experts=2 --set optimizer.batch=256
finish
