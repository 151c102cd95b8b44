# Bad input: one clear error for all ranks, exit status 1 (2 for the command line), soon, nothing written.
. "$(dirname "$0")/lib.sh"

all="1 2"
numbers=$all # of ranks that the next cases run on

# wrong STATUS NAME WORDS ARGUMENTS...: on each number of ranks. WORDS: several are separated by |.
wrong() {
  code=$1 title=$2
  printf '%s\n' "$3" | tr '|' '\n' >"$work/words"
  shift 3
  for ranks in $numbers; do
    what="$title, $ranks ranks"
    run $ranks "$@"
    expect_status "$code"
    [ "$seconds" -lt 20 ] || fail "expected an answer within 20 s, got one after $seconds s"
    expect_error
    while IFS= read -r words; do expect_text "$work/error-line" "$words"; done <"$work/words"
  done
}

refused() { # NAME WORDS ARGUMENTS...: of train, before the run directory is touched
  title=$1 text=$2
  shift 2
  wrong 1 "$title" "$text" train "$work/config.yaml" "$@"
  [ ! -e "$work/run" ] || fail "expected nothing at run.directory, got $(ls "$work/run")"
}

# A copy of the sound set that a case may damage
fresh() {
  rm -rf "$work/data"
  cp -r "$work/sound" "$work/data"
}

prepare samples=24
mv "$work/data" "$work/sound"
fresh

# ---- command line ----
wrong 2 "unknown subcommand" "fly|--help" fly
wrong 2 "unknown option" "--resumee" train "$work/config.yaml" --resumee
numbers=1
wrong 2 "no configuration" "usage" train
wrong 2 "two configurations" "unexpected|second.yaml" train "$work/config.yaml" "$work/second.yaml"
wrong 2 "--set without a value" "--set" train "$work/config.yaml" --set
numbers=$all
wrong 2 "--set without =" "--set steps|key=value" train "$work/config.yaml" --set steps
numbers=1
wrong 2 "--set without a key" "--set =3" train "$work/config.yaml" --set =3

# ---- configuration ----
numbers=$all
wrong 1 "configuration missing" "$work/none.yaml" train "$work/none.yaml"
wrong 1 "configuration a directory" "$work" train "$work"
head -c 3000 "$ANTIPHON" >"$work/binary.yaml"
wrong 1 "configuration binary" "binary.yaml" train "$work/binary.yaml"
: >"$work/empty.yaml"
wrong 1 "configuration empty" "empty.yaml|data.path|missing" train "$work/empty.yaml"
numbers=1
sed 's/^model:.*/model: [unclosed/' "$work/config.yaml" >"$work/broken.yaml"
wrong 1 "configuration not YAML" "broken.yaml:" train "$work/broken.yaml"
sed 's/rate: 0.003/rat: 0.003/' "$work/config.yaml" >"$work/typo.yaml"
wrong 1 "mistyped key" "typo.yaml:10|optimizer.rat|unknown key|rate" train "$work/typo.yaml"
sed 's/width: 16/width: wide/' "$work/config.yaml" >"$work/type.yaml"
wrong 1 "wrong type" "type.yaml:9|model.width|integer|wide" train "$work/type.yaml"

refused "unknown key by --set" "model.widht|unknown key" --set model.widht=3
refused "unknown modality by --set" "data.modalities.smell" --set data.modalities.smell.length=3
refused "wrong word" "parallel.placement|shared, partitioned" --set parallel.placement=scattered
refused "unknown backend" "run.device|auto" --set run.device=abacus
refused "number out of range" "optimizer.beta1|-1" --set optimizer.beta1=-1
refused "number beyond 64 bits" "run.steps" --set run.steps=99999999999999999999
refused "no finite number" "optimizer.rate" --set optimizer.rate=nan
refused "a model that does not fit" "needs|MiB|parameters and optimizer" --set model.hidden=16000000
refused "unknown precision" "run.precision|bfloat16" --set run.precision=float8
if ! "$ANTIPHON" --version | grep -q CUDA; then
  refused "no CUDA in this build" "cuda" --set run.device=cuda
  refused "NCCL on the CPU" "NCCL" --set run.device=cpu --set parallel.transport=nccl
fi
refused "heads do not divide the width" "model.heads|3|16" --set model.heads=3
numbers=$all
refused "more ranks than experts" "parallel.experts|at most 1 experts" --set parallel.experts=2 \
  --set model.moe.experts=1 --set data.modalities.image.experts=1
refused "expert-parallel size does not divide the ranks" "parallel.experts|3" --set parallel.experts=3
refused "batch not divisible" "optimizer.batch|9" --set optimizer.batch=9 --set optimizer.accumulate=2
refused "group does not divide a micro-batch" "model.moe.group_samples|3" \
  --set model.moe.dispatch=capacity --set model.moe.group_samples=3
numbers=1
refused "a pair of an unknown modality" "objective.pairs|image:smell" --set 'objective.pairs=["image:smell"]'

# ---- data ----
numbers=$all
refused "data directory missing" "$work/nowhere" --set data.path="$work/nowhere"
numbers=1
refused "split missing" "$work/data|practice" --set data.train=practice
mv "$work/data/validation" "$work/aside"
refused "held-out split missing" "$work/data|validation" --set evaluate.at_end=true
mv "$work/aside" "$work/data/validation"
rm "$work/data/train"/text-*
refused "modality missing" "$work/data/train|text"
fresh
numbers=$all
rm "$work/data/train/text-00001.h5"
refused "a shard of one modality missing" "text-00001.h5"
fresh
rm "$work/data/train/image-00000.h5" "$work/data/train/text-00000.h5"
numbers=1
refused "the first shard missing" "-00000.h5"
fresh
truncate -s 3000 "$work/data/train/image-00001.h5"
numbers=$all
refused "truncated shard" "image-00001.h5"
numbers=1
: >"$work/data/train/image-00001.h5"
refused "empty file" "image-00001.h5"
head -c 9000 "$ANTIPHON" >"$work/data/train/image-00001.h5"
refused "not HDF5" "image-00001.h5"
"$MAKE_SET" foreign="$work/data/train/image-00001.h5"
refused "HDF5 of others" "image-00001.h5|format"
rm "$work/data/train/image-00001.h5"
mkdir "$work/data/train/image-00001.h5"
refused "a directory for a shard" "image-00001.h5"
numbers=$all
fresh
"$MAKE_SET" directory="$work/data/train" samples=24 shift=text
refused "ids differ between modalities" "text-00000.h5|id"
fresh
"$MAKE_SET" directory="$work/data/train" samples=24 image=13
refused "widths differ between splits" "image|13|12" --set evaluate.at_end=true
fresh
cp "$work/sound/train/image-00001.h5" "$work/data/train/image-00000.h5"
refused "a shard twice under two names" "-00000.h5|id"
fresh
refused "learned positions too short" "data.modalities.image.length|4" --set data.modalities.image.length=3
"$MAKE_SET" directory="$work/data/validation" samples=0 shards=1
refused "zero validation samples" "$work/data/validation|no samples" --set evaluate.at_end=true
fresh
"$MAKE_SET" directory="$work/data/train" samples=0
refused "zero training samples" "$work/data/train|no samples"

# NaN: found when the latents are read, so the run directory is there already.
fresh
"$MAKE_SET" directory="$work/data/train" samples=24 nan=text nan_sample=17
wrong 1 "NaN at standardisation" "text-00001.h5|NaN" train "$work/config.yaml"
wrong 1 "NaN when streamed" "text-00001.h5|NaN" train "$work/config.yaml" \
  --set data.modalities.text.normalize=none
"$MAKE_SET" directory="$work/data/train" samples=24 nan=image nan_sample=3
wrong 1 "NaN on a modality's own rank" "image-00000.h5|NaN" train "$work/config.yaml"
fresh
rm -rf "$work/run"

# ---- writing ----
: >"$work/file"
wrong 1 "run.directory below a file" "$work/file" train "$work/config.yaml" --set run.directory="$work/file/run"
wrong 1 "run.directory a file" "$work/file" train "$work/config.yaml" --set run.directory="$work/file"
wrong 1 "run.directory in /proc" "/proc/run" train "$work/config.yaml" --set run.directory=/proc/run
numbers=1
mkdir -p "$work/run/metrics.jsonl"
wrong 1 "metrics.jsonl a directory" "metrics.jsonl" train "$work/config.yaml"
rm -rf "$work/run"
mkdir -p "$work/run"
: >"$work/run/checkpoints"
wrong 1 "checkpoints a file" "checkpoints" train "$work/config.yaml"
finish
