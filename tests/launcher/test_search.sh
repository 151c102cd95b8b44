# antiphon search: what it finds is what eval counts, however it is asked; what it refuses.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/serve_lib.sh"
prepare_serving

vectors() { # file, checkpoint, options...
  file=$1
  shift
  what="vectors $file"
  embed 1 "$@" -o "$work/$file.h5"
  expect_status 0
}
vectors text "$work/run" --key text
vectors image "$work/run" --key image
vectors text16 "$work/run" --key text --dtype float16
vectors image-text "$work/run" --query image:text
vectors text-image "$work/run" --query text:image
vectors tower-image "$work/tower" --key image
vectors tower-text "$work/tower" --key text --set evaluate.batch=5

search() { # gallery, options...
  gallery=$1
  shift
  run 1 search "$work/$gallery.h5" "$@"
}

# ---- recall ----

# What eval prints for a direction, made of what search finds: a query whose own id is among the first k
recall() { # checkpoint, direction as eval names it, gallery, queries
  what="recall of $2 by search"
  run 1 eval "$1"
  expect_status 0
  grep "^$2" "$work/out" | tr -s ' ' | cut -d ' ' -f 4-8 >"$work/expected"
  [ -s "$work/expected" ] || fail "eval prints no $2"
  search "$3" --query "$work/$4.h5" -k 50
  expect_status 0
  awk 'NR > 1 {if ($2 > n) n = $2; if ($1 == $3) {queries++; for (k = 1; k <= 10; k++) if ($2 <= k) hit[k]++}}
    END {printf "%d %d %.2f%% %.2f%% %.2f%%\n", queries, n, 100 * hit[1] / queries, 100 * hit[5] / queries,
      100 * hit[10] / queries}' "$work/out" >"$work/got"
  expect_same_file "queries, gallery, R@1, R@5, R@10" "$work/expected" "$work/got"
}
recall "$work/run" "image -> text" text image-text
recall "$work/run" "text -> image" image text-image
recall "$work/tower" "image -> text" tower-text tower-image
recall "$work/tower" "text -> image" tower-image tower-text

# ---- the same answer, however it is asked ----

search text --query "$work/image-text.h5" -k 7
cp "$work/out" "$work/expected"
what="the table"
expect_equal "lines" $((1 + 7 * 50)) "$(lines "$work/expected")"
expect_text "$work/expected" query rank score sample-5001
same() { # name, options...
  what=$1
  shift
  search text -k 7 "$@"
  expect_status 0
  expect_same_file "answers" "$work/expected" "$work/out"
}
for threads in 1 2 5; do
  same "$threads threads" --query "$work/image-text.h5" --threads $threads
  same "batches of 3, $threads threads" --query "$work/image-text.h5" --threads $threads --batch 3
done
same "one by one" --query "$work/image-text.h5" --one-by-one
same "a batch larger than all" --query "$work/image-text.h5" --batch 5000
same "latents on the fly" --latents "$work/data" --checkpoint "$work/run" --direction image:text
same "latents of a directory" --latents "$work/data/validation" --checkpoint "$(step_path "$work/run" 30)" \
  --direction image:text --one-by-one

what="a tower's latents on the fly"
search tower-text --query "$work/tower-image.h5" -k 4
cp "$work/out" "$work/expected"
search tower-text --latents "$work/data" --checkpoint "$work/tower" --direction image:text -k 4
expect_same_file "answers" "$work/expected" "$work/out"

what="a gallery of float16"
search text --query "$work/image-text.h5" -k 1
awk '{print $1, $3}' "$work/out" >"$work/full"
search text16 --query "$work/image-text.h5" -k 1
expect_status 0
awk '{print $1, $3}' "$work/out" >"$work/half"
expect_equal "lines" 51 "$(lines "$work/half")"
differ=$(paste -d ' ' "$work/full" "$work/half" | awk '$2 != $4' | wc -l)
[ "$differ" -le 2 ] || fail "$differ of 50 best matches are others than with float32"

what="JSON"
search text --query "$work/image-text.h5" -k 2 --json
expect_status 0
expect_equal "lines" 50 "$(lines "$work/out")"
expect_text "$work/out" '"query": 5001, "matches": [{"id": ' '"key": "sample-'
sed 's/.*"query": \([0-9]*\),.*\[{"id": \([0-9]*\),.*/\1 \2/' "$work/out" >"$work/got"
sed 1d "$work/full" >"$work/best"
expect_same_file "best matches" "$work/best" "$work/got"

what="ids of the gallery"
search text --ids 5007,5002,5052 -k 3
expect_status 0
expect_equal "lines" 10 "$(lines "$work/out")"
expect_equal "queries, and that each finds itself first" "5007 5007 5002 5002 5052 5052 " \
  "$(awk '$2 == 1 {print $1, $3}' "$work/out" | tr '\n' ' ')"
what="keys look among keys of their modality"
search text --query "$work/text.h5" -k 1
expect_status 0
awk 'NR > 1 && $1 != $3' "$work/out" >"$work/got"
expect_equal "vectors that do not find themselves" 0 "$(lines "$work/got")"
what="more matches than vectors"
search text --ids 5002 -k 1000
expect_status 0
expect_text "$work/err" "the gallery has 50 vectors"
expect_equal "lines" 51 "$(lines "$work/out")"

# ---- bad input ----

refused() { # name, words, gallery, options...
  what=$1 words=$2
  shift 2
  search "$@"
  expect_status 1
  expect_error "$words"
  [ -s "$work/out" ] && fail "something was printed"
}
refused "no gallery" "there is no" nothing --ids 1
refused "queries as gallery" "holds queries of image:text and cannot be a gallery" image-text --ids 5001
refused "no such id" "no vector of id 77" text --ids 5002,77
refused "a sample that lacks the modality" "no vector of id 5006" text --ids 5006
refused "no queries" "there is no" text --query "$work/nothing.h5"
refused "queries of another model" "vectors of different models" text --query "$work/tower-image.h5"
refused "queries toward another modality" "asks for 'image', the gallery" text --query "$work/text-image.h5"
refused "keys of another modality" "a connector asks with queries" text --query "$work/image.h5"
refused "latents of another model" "vectors of different models" text --latents "$work/data" \
  --checkpoint "$work/tower" --direction image:text
refused "a direction toward another modality" "asks for 'image', the gallery" text --latents "$work/data" \
  --checkpoint "$work/run" --direction text:image
refused "a direction from an absent modality" "no modality 'smell'" text --latents "$work/data" \
  --checkpoint "$work/run" --direction smell:text

run 1 train "$work/connector.yaml" --set run.steps=34
expect_status 0
vectors later "$work/run" --query image:text
refused "queries of a later checkpoint" "(step 34), the gallery" text --query "$work/later.h5"
refused "latents of a later checkpoint" "(step 34), the gallery" text --latents "$work/data" \
  --checkpoint "$work/run" --direction image:text
write_connector "$work/wide.yaml" "$work/wide" 2
run 1 train "$work/wide.yaml" --set model.embedding=12
vectors wide "$work/wide" --query image:text
refused "queries of another width" "vectors of different models" text --query "$work/wide.h5"

"$MAKE_SET" directory="$work/none/validation" samples=1 shards=1 first=5000 absent=1
vectors empty "$work/run" "$work/none" --key image
refused "an empty gallery" "is an empty gallery" empty --ids 1

for part in 10 30 60 90 99; do
  size=$(wc -c <"$work/text.h5")
  head -c $((size * part / 100)) "$work/text.h5" >"$work/short.h5"
  what="cut at $part %"
  search short --query "$work/image-text.h5"
  expect_status 1
  expect_error "short.h5"
done
what="a vector inverted"
cp "$work/text.h5" "$work/bad.h5"
"$MAKE_SET" flip="$work/bad.h5" at=-200
refused "a byte of a vector" "bad.h5 is damaged: vectors" bad --query "$work/image-text.h5"
refused "a byte of a vector, in memory" "bad.h5 is damaged: vectors" bad --query "$work/image-text.h5" --one-by-one
refused "a byte of a query" "bad.h5 is damaged" text --query "$work/bad.h5"
cp "$work/text.h5" "$work/bad.h5"
"$MAKE_SET" flip="$work/bad.h5" at=100
refused "a byte of the header" "bad.h5: the header does not match its checksum" bad --ids 5002
"$MAKE_SET" foreign="$work/foreign.h5"
refused "an HDF5 file of somebody" "foreign.h5 is no file of" foreign --ids 1
refused "a shard" "is no file of" data/validation/text-00000 --ids 1

what="what inspect says"
run 1 inspect "$work/image-text.h5"
expect_status 0
expect_text "$work/out" "50 query vectors of image:text, width 8, float32" "with keys" "step 30, content"
run 1 check "$work/text16.h5"
expect_status 0
expect_text "$work/out" "text16.h5: sound"
cp "$work/text.h5" "$work/bad.h5"
"$MAKE_SET" flip="$work/bad.h5" at=-200
run 1 check "$work/bad.h5"
expect_status 1
expect_error "bad.h5 is damaged"

what="an unfinished file"
fault 25 exit unfinished.h5 1 embed "$work/run" --query image:text -o "$work/unfinished.h5"
mv "$work/unfinished.h5.part" "$work/unfinished.h5"
search unfinished --ids 5001
expect_status 1
expect_error "is not finished"

usage() { # name, options...
  what=$1
  shift
  search text "$@"
  expect_status 2
}
usage "k = 0" --ids 5001 -k 0
usage "negative k" --ids 5001 -k -3
usage "k that is no number" --ids 5001 -k ten
usage "nothing to look for"
usage "two things to look for" --ids 1 --query "$work/image-text.h5"
usage "ids that are none" --ids 5001,x
usage "latents without checkpoint" --latents "$work/data" --direction image:text
usage "one by one in batches" --ids 5001 --one-by-one --batch 4
what="two ranks"
run 2 search "$work/text.h5" --ids 5001
expect_status 2
finish
