# antiphon embed: the same file on any number of ranks, after any interruption; what it refuses.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/serve_lib.sh"
prepare_serving

# ---- any number of ranks ----

same_on_ranks() { # name, options...
  name=$1
  shift
  for n in 1 2 4 7; do
    what="$name on $n ranks"
    embed $n "$@" -o "$work/$name.$n.h5"
    expect_status 0
    cmp -s "$work/$name.1.h5" "$work/$name.$n.h5" || fail "the file is another one than on one rank"
    [ -e "$work/$name.$n.h5.part" ] && fail "FILE.part is left"
  done
}
same_on_ranks key "$work/run" --key text
same_on_ranks query "$work/run" --query image:text --dtype float16
same_on_ranks tower "$work/tower" --key image
same_on_ranks small "$work/tower" --key text --set evaluate.batch=3
same_on_ranks train "$work/run" --key image --split train

what="samples without the modality are left out"
expect_text "$work/err" "42 key vectors of width 8, float32, from 45 samples"

what="the file names its checkpoint"
hash=$(content "$(step_path "$work/run" 30)")
[ ${#hash} = 16 ] && grep -q "$hash" "$work/key.1.h5" || fail "expected the hash '$hash' in the file"

what="a directory of shards, of one modality"
mkdir "$work/only"
cp "$work/data/validation"/text-*.h5 "$work/only"
embed 2 "$work/run" "$work/only" --key text -o "$work/only.h5"
expect_status 0
cmp -s "$work/key.1.h5" "$work/only.h5" || fail "another file than that of the whole set"

# ---- again, and something else ----

what="again"
before=$(stat -c %Y%i "$work/key.2.h5")
embed 2 "$work/run" --key text -o "$work/key.2.h5"
expect_status 0
expect_text "$work/err" "is there already"
expect_equal "the file" "$before" "$(stat -c %Y%i "$work/key.2.h5")"
other() { # name, checkpoint, options...
  what="the file of something else: $1"
  shift
  for n in 1 2; do
    embed $n "$@" -o "$work/key.1.h5"
    expect_status 1
    expect_error "key.1.h5 was made from something else" "another -o"
    cmp -s "$work/key.1.h5" "$work/key.4.h5" || fail "the file was touched"
  done
}
other modality "$work/run" --key image
other direction "$work/run" --query text:image
other dtype "$work/run" --key text --dtype float16
other split "$work/run" --key text --split train
other checkpoint "$work/tower" --key text
other precision "$work/run" --key text --set run.precision=bfloat16
other setting "$work/run" --key text --set model.norm_epsilon=0.001
what="a file of somebody"
echo text >"$work/notes.h5"
embed 2 "$work/run" --key text -o "$work/notes.h5"
expect_status 1
expect_error "notes.h5" "remove it or choose another -o"
expect_equal "the file" text "$(cat "$work/notes.h5")"

# ---- interrupted ----

# Ended at every operation on the file and its parts, as if killed there
met() { [ "$status" != 0 ]; }
crash() { # at
  rm -f "$work"/crash.h5*
  fault "$1" exit crash.h5 1 embed "$work/run" --key text -o "$work/crash.h5"
}
what="killed at every operation"
at=1
crash $at
while met; do
  run 1 embed "$work/run" --key text -o "$work/crash.h5"
  expect_status 0
  cmp -s "$work/key.1.h5" "$work/crash.h5" || fail "killed at operation $at: another file"
  [ -e "$work/crash.h5.part" ] && fail "killed at operation $at: FILE.part is left"
  at=$((at + 1))
  crash $at
done
[ $at -gt 20 ] || fail "expected more than 20 operations, there were $at"

what="a full disk"
for at in 3 9 15 22; do
  for n in 1 2; do
    rm -f "$work"/crash.h5*
    fault $at 28 crash.h5 $n embed "$work/run" --key text -o "$work/crash.h5"
    expect_status 1
    expect_error "crash.h5" "No space left"
    run $n embed "$work/run" --key text -o "$work/crash.h5"
    expect_status 0
    cmp -s "$work/key.1.h5" "$work/crash.h5" || fail "failed at operation $at: another file"
  done
done

# A set that takes a while where writing is slow, in blocks of one sample
"$MAKE_SET" directory="$work/long" samples=4000 shards=1 first=9000 rows=6
slow="$work/run $work/long --query image:text --set evaluate.batch=1"
what="the long one"
# shellcheck disable=SC2086
embed 1 $slow -o "$work/long.h5"
expect_status 0
slowly() { # ranks
  ANTIPHON_FAULT_FILE=1:sleep=1:cut.h5
  export ANTIPHON_FAULT_FILE
  # shellcheck disable=SC2086
  start "$1" embed $slow -o "$work/cut.h5"
  unset ANTIPHON_FAULT_FILE
}
begun() { [ -s "$work/cut.h5.part" ]; }
for signal in TERM USR1 KILL; do
  for n in 1 2; do
    what="SIG$signal in the middle on $n ranks"
    rm -f "$work"/cut.h5*
    slowly $n
    until_true 30 begun || fail "it ended before FILE.part was there"
    sleep 0.3
    kill -$signal "$(pid $((n - 1)))" 2>/dev/null
    wait_job
    if [ $signal = KILL ]; then
      [ "$status" = 0 ] && fail "expected that it was killed"
    else
      expect_status 75
      expect_text "$work/err" "start again to go on"
    fi
    [ -e "$work/cut.h5" ] && fail "the file is there before it is whole"
    # On another number of ranks than before
    # shellcheck disable=SC2086
    embed $((3 - n)) $slow -o "$work/cut.h5"
    expect_status 0
    kept=$(sed -n 's/.*cut.h5: \([0-9]*\) of 4000 blocks are there.*/\1/p' "$work/err")
    [ "${kept:-0}" -gt 0 ] || fail "expected that blocks were kept, got '$kept'"
    cmp -s "$work/long.h5" "$work/cut.h5" || fail "another file"
  done
done

what="a part of something else"
rm -f "$work"/cut.h5*
crash 20
[ -e "$work/crash.h5.part" ] || fail "expected a part"
mv "$work/crash.h5.part" "$work/cut.h5.part"
embed 2 "$work/run" --query image:text -o "$work/cut.h5"
expect_status 1
expect_error "cut.h5.part was made from something else"
what="two at a time"
rm -f "$work"/cut.h5*
slowly 1
until_true 30 begun
# shellcheck disable=SC2086
"$ANTIPHON" embed $slow -o "$work/cut.h5" 2>"$work/second" && fail "the second one did not fail"
grep -q "another process is writing" "$work/second" || fail "expected that the second one says why"
wait_job
expect_status 0
cmp -s "$work/long.h5" "$work/cut.h5" || fail "another file"

# ---- bad input ----

refused() { # name, words, checkpoint, options...
  what=$1 words=$2
  shift 2
  for n in 1 2; do
    embed $n "$@" -o "$work/refused.h5"
    expect_status 1
    expect_error "$words"
    for file in "$work"/refused*; do [ -e "$file" ] && fail "$file was written"; done
  done
}
refused "an absent modality" "no modality 'speech'; it has 'image', 'text'" "$work/run" --key speech
refused "a direction from an absent modality" "no modality 'smell'" "$work/run" --query smell:text
refused "a direction toward an absent modality" "no modality 'smell'" "$work/run" --query text:smell
refused "a direction that was not trained" "not trained in the direction image:image" "$work/run" --query image:image
refused "queries of a tower" "use --key image" "$work/tower" --query image:text
refused "no checkpoint" "nothing" "$work/nothing" --key text
refused "no such split" "practice" "$work/run" --key text --split practice
refused "no such shards" "nowhere" "$work/run" "$work/nowhere" --key text
"$MAKE_SET" directory="$work/wide/validation" samples=9 shards=1 image=13
refused "another width" "'image' is 13 wide" "$work/run" "$work/wide" --key image
"$MAKE_SET" directory="$work/tall/validation" samples=90 shards=1 rows=40
refused "more tokens than positions" "8 positions" "$work/tower" "$work/tall" --key image
"$MAKE_SET" directory="$work/nan/validation" samples=29 shards=1 nan=text nan_sample=20
for n in 1 2; do
  what="NaN in a latent, $n ranks"
  embed $n "$work/run" "$work/nan" --key text -o "$work/nan.h5"
  expect_status 1
  expect_error "text-00000.h5" "NaN"
done
what="where nothing can be written"
embed 2 "$work/run" --key text -o "$work/no/such/file.h5"
expect_status 1
expect_error "no/such/file.h5"
usage() { # name, options...
  what=$1
  shift
  embed 1 "$@"
  expect_status 2
}
usage "no -o" "$work/run" --key text
usage "neither key nor query" "$work/run" -o "$work/refused.h5"
usage "both" "$work/run" --key text --query image:text -o "$work/refused.h5"
usage "another dtype" "$work/run" --key text --dtype float64 -o "$work/refused.h5"
usage "no direction" "$work/run" --query image -o "$work/refused.h5"
usage "no value" "$work/run" --key
finish
