# An extended model that has no room where the original had some: refused before anything is written.
. "$(dirname "$0")/lib.sh"
: "${SMALL_MEMORY:?tests/launcher/small_memory}"

prepare samples=12
# An expert of 6 MiB, two of them
run 1 train "$work/config.yaml" --set run.steps=1 --set model.width=64 --set model.layers=1 --set model.moe.experts=2 \
  --set model.moe.hidden=8192 --set evaluate.batch=2
expect_status 0

with() { # MiB: the extension on a machine of so many
  SMALL_MEMORY_MIB=$1 LD_PRELOAD=$SMALL_MEMORY
  export SMALL_MEMORY_MIB LD_PRELOAD
  run 1 extend "$work/run" --layers all -o "$work/extended"
  unset SMALL_MEMORY_MIB LD_PRELOAD
}

what="no room for the original"
with 1
expect_status 1
expect_error "needs" "on cpu, which has 1 MiB free"
grep -q 'the extended model' "$work/error-line" && fail "expected the original to be refused"
need=$(sed -n 's/.*rank 0 needs \([0-9]*\) MiB.*/\1/p' "$work/error-line")
[ "$need" -gt 12 ] || fail "expected at least two experts, got $need MiB"

what="room for the original alone"
with $((need + 2))
expect_status 1
expect_error "the extended model: rank 0 needs" "has $((need + 2)) MiB free"
[ ! -e "$work/extended/step-00000000" ] && [ ! -e "$work/extended/extend.json" ] || fail "expected nothing to be written"

what="room for both"
with $((need + 40))
expect_status 0
[ -e "$work/extended/step-00000000" ] || fail "expected a checkpoint"
finish
