# eval, inspect, check, and help everywhere.
. "$(dirname "$0")/lib.sh"

tell() { # ARGUMENTS...: one process; sets status, output in out and err
  "$ANTIPHON" "$@" >"$work/out" 2>"$work/err" </dev/null
  status=$?
  seconds=0
}

# ---- help ----

for words in --help -h help --version "train --help" "eval --help" "inspect --help" "check --help" "bench --help" \
  "train -h" "train nothing.yaml --help"; do
  what="antiphon $words"
  tell $words
  expect_status 0
  [ -s "$work/out" ] || fail "expected help on standard output"
  [ ! -s "$work/err" ] || fail "expected nothing on standard error"
done
tell --help
for command in train eval inspect check bench; do expect_text "$work/out" "$command"; done
expect_text "$work/out" 75 SIGTERM

what="help under mpirun"
run 2 train --help
expect_status 0

what="no command"
tell
expect_status 2
expect_text "$work/err" "usage"

what="the steps of bench gpu, made small, on the CPU: settings of the command line win"
run 1 bench gpu --json --set run.device=cpu --set run.precision=float32 --set model.heads=2 --set optimizer.batch=8 \
  --set run.threads=1 --set model.hidden=32 --set model.embedding=8 --set model.layers=2 --set model.width=32
expect_status 0
expect_equal "steps" 3 "$(grep -c '"device": "cpu".*"float32", "width": 32.*"experts": 16, "choose": 2' "$work/out")"

# ---- eval ----

prepare samples=45 filter=shuffle+zstd
# Rows enough for several chunks in a shard
"$MAKE_SET" directory="$work/data/validation" samples=53 shards=2 first=5000 absent=6
sets="--set run.steps=30 --set checkpoint.interval=10 --set evaluate.at_end=true"
run 1 train "$work/config.yaml" $sets
expect_status 0
sed -n '/direction/,$p' "$work/out" >"$work/expected"
expect_equal "directions" 2 "$(grep -c -e '->' "$work/expected")"

table() { # what-to-evaluate...
  sed -n '/direction/,$p' "$work/out" >"$work/table"
  expect_status 0
  expect_same_file "tables" "$work/expected" "$work/table"
}

for ranks in 1 2 4; do
  what="eval on $ranks ranks"
  run $ranks eval "$(step_path "$work/run" 30)"
  expect_text "$work/out" "step 30" "53 samples"
  table
done
what="eval of a run directory"
run 2 eval "$work/run" "$work/data" --split validation
table
what="eval with another batch"
run 2 eval "$work/run" --set evaluate.batch=7
table
what="eval of a checkpoint of another layout"
run 2 train "$work/config.yaml" $sets --set parallel.experts=2 --set parallel.placement=partitioned \
  --set model.moe.dispatch=capacity --set model.moe.capacity=8 --set run.directory="$work/wide"
expect_status 0
sed -n '/direction/,$p' "$work/out" >"$work/expected"
for ranks in 1 2; do
  what="eval of a checkpoint of two ranks, on $ranks"
  run $ranks eval "$work/wide"
  table
done
what="eval on the training split"
run 1 eval "$work/run" --split train
expect_status 0
expect_text "$work/out" "45 samples"

for ranks in 1 2; do
  what="eval of nothing, $ranks ranks"
  run $ranks eval "$work/nothing"
  expect_status 1
  expect_error "$work/nothing"
  what="eval of a split that is not there, $ranks ranks"
  run $ranks eval "$work/run" --split practice
  expect_status 1
  expect_error practice
  what="eval with data that are not there, $ranks ranks"
  run $ranks eval "$work/run" "$work/nothing"
  expect_status 1
  expect_error "$work/nothing"
done
"$MAKE_SET" directory="$work/other/validation" samples=9 shards=1 image=13
what="eval of another width"
run 2 eval "$work/run" "$work/other"
expect_status 1
expect_error image 13 12

# ---- inspect and check: sound things ----

shard=$work/data/train/image-00000.h5
for path in "$shard" "$work/data/train" "$work/data" "$work/run" "$(step_path "$work/run" 30)" "$work/run/checkpoints" \
  "$work/config.yaml" "$work/run/config.yaml"; do
  for command in inspect check; do
    what="$command $path"
    tell $command "$path"
    expect_status 0
    [ -s "$work/out" ] || fail "expected a description"
  done
done
what="what inspect says"
tell inspect "$shard"
expect_text "$work/out" image 12 float32
tell inspect "$(step_path "$work/run" 30)"
expect_text "$work/out" "step 30" parameter/ adam_m/
tell inspect "$work/config.yaml"
expect_text "$work/out" "weight_decay: 0.1"
printf '%s\n' "$(cat "$work/out")" >"$work/again.yaml"
tell inspect "$work/again.yaml"
expect_same_file "a configuration printed with its defaults, and printed again" "$work/again.yaml" "$work/out"

# ---- inspect and check: unsound things ----

unsound() { # NAME PATH WORDS...
  what=$1 path=$2
  shift 2
  tell check "$path"
  expect_status 1
  expect_error "$@"
}

unsound "nothing there" "$work/nothing" "$work/nothing"
mkdir "$work/void"
unsound "an empty directory" "$work/void" "$work/void"
unsound "a text" "$0" "$(basename "$0")"
tell check
expect_status 2
sed 's/rate: 0.003/rat: 0.003/' "$work/config.yaml" >"$work/typo.yaml"
unsound "a configuration with a mistyped key" "$work/typo.yaml" typo.yaml:10 rat
sed 's/batch: 8/batch: 0/' "$work/config.yaml" >"$work/zero.yaml"
unsound "a configuration that cannot be" "$work/zero.yaml" zero.yaml:10 optimizer.batch

# Every fifth byte of the compressed latents would do; a few are tried. The latents end the file or nearly.
cp "$shard" "$work/image-00000.h5"
size=$(wc -c <"$shard")
found=0 tried=0
for part in 30 45 60 75 90; do
  cp "$shard" "$work/image-00000.h5"
  "$MAKE_SET" flip="$work/image-00000.h5" at=$((size * part / 100))
  tell check "$work/image-00000.h5"
  tried=$((tried + 1))
  [ "$status" = 1 ] && found=$((found + 1))
done
what="a byte of a compressed chunk inverted"
expect_equal "of $tried damaged shards, found" "$tried" "$found"
for filter in none gzip shuffle+gzip zstd; do
  what="a byte of a chunk inverted, filter $filter"
  rm -rf "$work/one"
  "$MAKE_SET" directory="$work/one" samples=400 shards=1 text=0 filter=$filter
  size=$(wc -c <"$work/one/image-00000.h5")
  "$MAKE_SET" flip="$work/one/image-00000.h5" at=$((size / 2))
  unsound "$what" "$work/one" image-00000.h5
done
"$MAKE_SET" directory="$work/one" samples=40 shards=1 text=0 nan=image
unsound "NaN in a shard" "$work/one/image-00000.h5" image-00000.h5 NaN
cp -r "$(step_path "$work/run" 30)" "$work/step-00000030"
"$MAKE_SET" flip="$work/step-00000030/rank-00000.ckpt" at=3000
unsound "a byte of a checkpoint inverted" "$work/step-00000030" rank-00000.ckpt
cp -r "$work/step-00000030" "$work/run/checkpoints/step-00000031"
unsound "a run directory with a damaged checkpoint" "$work/run" step-00000031
finish
