# Damaged checkpoints: the newest sound one is taken, the others are named; nothing sound is ever removed.
. "$(dirname "$0")/lib.sh"

sets="--set run.steps=12 --set checkpoint.interval=3 --set parallel.experts=2"

make_run() {
  rm -rf "$work/run"
  cp -r "$work/original" "$work/run"
  newest=$(step_path "$work/run" 12)
}

resumes_from() { # step file-that-is-named
  run 2 train "$work/config.yaml" $sets
  expect_status 0
  expect_text "$work/err" "resumed at step $1" "step-00000012" "$2"
  expect_equal "content" "$whole" "$(content "$newest")"
  expect_steps "$work/run" 12
  "$ANTIPHON" check "$work/run" >"$work/check" 2>&1 || fail "expected a sound run directory: $(tail -1 "$work/check")"
}

not_sound() { # path words: `antiphon check` finds it
  "$ANTIPHON" check "$1" >"$work/check" 2>&1
  expect_equal "exit status of check" 1 $?
  expect_text "$work/check" "$2"
}

prepare samples=45
run 2 train "$work/config.yaml" $sets
expect_status 0
whole=$(content "$(step_path "$work/run" 12)")
mv "$work/run" "$work/original"

size=$(wc -c <"$(step_path "$work/original" 12)/rank-00001.ckpt")
for at in 0 40 $((size / 3)) $((size - 40)) $((size - 1)); do
  what="byte $at of $size inverted"
  make_run
  "$MAKE_SET" flip="$newest/rank-00001.ckpt" at=$at
  not_sound "$newest" "rank-00001.ckpt"
  resumes_from 9 rank-00001.ckpt
done

what="a byte of the manifest inverted"
make_run
"$MAKE_SET" flip="$newest/manifest.json" at=900
not_sound "$newest" manifest.json
resumes_from 9 manifest.json

what="a file cut short"
make_run
truncate -s $((size / 2)) "$newest/rank-00000.ckpt"
not_sound "$newest" rank-00000.ckpt
resumes_from 9 rank-00000.ckpt

what="an empty file"
make_run
: >"$newest/rank-00000.ckpt"
resumes_from 9 rank-00000.ckpt

what="a file missing"
make_run
rm "$newest/rank-00001.ckpt"
not_sound "$newest" rank-00001.ckpt
resumes_from 9 rank-00001.ckpt

what="the manifest missing"
make_run
rm "$newest/manifest.json"
resumes_from 9 manifest.json

what="the manifest missing everywhere"
make_run
rm "$work"/run/checkpoints/step-*/manifest.json
run 2 train "$work/config.yaml" $sets
expect_status 1
[ -f "$newest/rank-00000.ckpt" ] || fail "expected what has lost its manifest to be left as it is"

what="the files of two ranks exchanged"
make_run
mv "$newest/rank-00000.ckpt" "$work/aside"
mv "$newest/rank-00001.ckpt" "$newest/rank-00000.ckpt"
mv "$work/aside" "$newest/rank-00001.ckpt"
resumes_from 9 rank-0000

what="a file of another step"
make_run
cp "$(step_path "$work/run" 9)/rank-00001.ckpt" "$newest/rank-00001.ckpt"
resumes_from 9 rank-00001.ckpt

what="two newest damaged"
make_run
"$MAKE_SET" flip="$newest/rank-00001.ckpt" at=500
: >"$(step_path "$work/run" 9)/manifest.json"
resumes_from 6 rank-00001.ckpt
expect_text "$work/err" "step-00000009"

what="all damaged"
make_run
for step in 3 6 9 12; do truncate -s 100 "$(step_path "$work/run" $step)/rank-00000.ckpt"; done
(cd "$work/run" && find . -type f ! -name log.txt | LC_ALL=C sort | xargs cksum) >"$work/before"
for ranks in 1 2; do
  run $ranks train "$work/config.yaml" --set run.steps=12 --set checkpoint.interval=3
  expect_status 1
  expect_error "none of the 4 checkpoints" "$work/run/checkpoints" "step-00000012"
done
(cd "$work/run" && find . -type f ! -name log.txt ! -name config.yaml | LC_ALL=C sort | xargs cksum) >"$work/after"
grep -v config.yaml "$work/before" >"$work/before.files"
expect_same_file "files of the run" "$work/before.files" "$work/after"

what="the given checkpoint damaged"
make_run
"$MAKE_SET" flip="$newest/rank-00000.ckpt" at=500
run 2 train "$work/config.yaml" $sets --resume "$newest" --set run.directory="$work/other"
expect_status 1
expect_error "step-00000012" "rank-00000.ckpt"

what="unfinished directories"
make_run
mkdir "$work/run/checkpoints/step-00000015.tmp" "$work/run/checkpoints/step-00000018" "$work/run/checkpoints/step-00000002"
echo half >"$work/run/checkpoints/step-00000002/rank-00000.ckpt"
echo half >"$work/run/checkpoints/step-00000015.tmp/rank-00000.ckpt"
echo half >"$work/run/checkpoints/step-00000018/rank-00000.ckpt"
echo mine >"$work/run/checkpoints/notes.txt"
run 2 train "$work/config.yaml" $sets
expect_status 0
expect_text "$work/err" "resumed at step 12" "step-00000018 has no manifest.json"
[ ! -e "$work/run/checkpoints/step-00000015.tmp" ] || fail "expected step-00000015.tmp to be removed"
[ ! -e "$work/run/checkpoints/step-00000002" ] || fail "expected step-00000002, a removal that was interrupted, to be removed"
[ -e "$work/run/checkpoints/step-00000018" ] || fail "expected step-00000018, which has lost its manifest, to be left alone"
[ -e "$work/run/checkpoints/notes.txt" ] || fail "expected a user's file to stay"
finish
