# A run of an earlier program (fixtures/) is evaluated and goes on, on its own layout and on another: the same tensors
# under the same names, the figures of then, the losses of the run as it went on then.
. "$(dirname "$0")/lib.sh"
fixtures=$(cd "$(dirname "$0")/fixtures" && pwd) || exit 1

# Names, types, shapes and hashes of a checkpoint's tensors, whoever wrote which part
tensors() { # checkpoint
  tr '{' '\n' <"$1/manifest.json" | sed -n 's/"name":\("[^"]*","dtype".*\),"parts".*/\1/p'
}

# The step, the position in the data, the fingerprint: what is stored beside the tensors, but for the layout
state() { # checkpoint
  "$ANTIPHON" inspect "$1" | sed -n '/^step: /,/^config/p' | grep -v -e '^ranks' -e '^expert_ranks' -e '^config'
}

expect_state() { # expected got: what the old one says; a later program may say more
  [ "$(lines "$1")" -ge 5 ] || fail "expected five values in $1"
  while read -r line; do grep -qxF -- "$line" "$2" || fail "expected $line beside the tensors"; done <"$1"
}

# Directions, queries, gallery, R@1, R@5, R@10
retrieval() { # output of eval
  awk '$2 == "->" {print $1, $2, $3, $4, $5, $6, $7, $8}' "$1"
}

take_up() { # version kind ranks
  kind=$2 ranks=$3
  old=$kind/checkpoints/step-00000008 new=$work/saved/checkpoints/step-00000008
  rm -rf "$work/old" "$work/saved"
  cp -r "$fixtures/$1" "$work/old"
  cd "$work/old" || exit 1
  what="$1, $kind: evaluated on $ranks ranks"
  run "$ranks" eval $old data
  expect_status 0
  retrieval "$work/out" >"$work/retrieval"
  expect_same_file "retrieval" $kind-after/retrieval "$work/retrieval"
  what="$1, $kind: saved again on $ranks ranks"
  run "$ranks" train $kind.yaml --resume $old --set run.steps=8 --set parallel.experts="$ranks" \
    --set run.directory="$work/saved"
  expect_status 0
  tensors $old >"$work/expected"
  tensors "$new" >"$work/got"
  [ "$(lines "$work/expected")" -gt 100 ] || fail "expected the names of more than 100 tensors"
  expect_same_file "tensors" "$work/expected" "$work/got"
  expect_equal "content" "$(content $old)" "$(content "$new")"
  state $old >"$work/expected"
  state "$new" >"$work/got"
  expect_state "$work/expected" "$work/got"
  what="$1, $kind: trained on, $ranks ranks"
  run "$ranks" train $kind.yaml --set parallel.experts="$ranks"
  expect_status 0
  expect_text "$work/err" "resumed at step 8" "written by 2 ranks"
  expect_steps $kind 11 9
  expect_close 1e-4 $kind-after $kind
}

for ranks in 1 2; do
  take_up v1 tower $ranks
  take_up v1 connector $ranks
done
what="the old runs' own files"
run 1 check "$fixtures/v1/data"
expect_status 0
for kind in tower connector; do
  run 1 check "$fixtures/v1/$kind/checkpoints/step-00000008"
  expect_status 0
done
finish
