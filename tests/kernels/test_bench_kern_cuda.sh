#!/bin/sh
# The benchmark of the CUDA backend says something about every op and every form of product, and the summary of its
# figures reads them: test_bench_kern_cuda.sh BENCH SUMMARY PYTHON. The figures themselves are not looked at.
set -u
bench=$1 summary=$2 python=$3
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

"$bench" 160 64 4 1 >"$work/kernels.jsonl"
status=$?
[ $status = 0 ] || { cat "$work/kernels.jsonl"; exit $status; }

bad=0
has() { grep -q "$1" "$work/kernels.jsonl" || { echo "no line has $1"; bad=1; }; }
for type in bfloat16 float32; do
  for skew in equal mild extreme; do
    for form in NN NT TN; do
      for by in loop streams; do
        has "gemm_grouped\", \"form\": \"$form\", \"type\": \"$type\", .*\"skew\": \"$skew\", \"by\": \"$by\""
      done
    done
    has "\"type\": \"$type\", .*\"skew\": \"$skew\", \"by\": \"grouped\""
  done
  has "\"type\": \"$type\", .*\"skew\": \"equal\", \"by\": \"strided\""
  has "\"op\": \"gemm_square\", .*\"type\": \"$type\""
  for op in adamw attention_cached combine_bwd contrastive_bwd gather_rows router_second swiglu_fwd; do
    has "\"op\": \"$op\", \"type\": \"$type\", .*\"of_copy\""
  done
done

cat >"$work/steps.jsonl" <<'END'
{"bench": "step", "ranks": 1, "width": 512, "tokens_per_second": 30, "active_share": 0.6}
{"bench": "torch step", "width": 512, "pure": false, "tokens_per_second": 20}
{"bench": "torch step", "width": 512, "pure": true, "tokens_per_second": 40}
{"bench": "step", "ranks": 1, "width": 2048, "tokens_per_second": 30, "active_share": 0.4}
END
PYTHONDONTWRITEBYTECODE=1 "$python" "$summary" "$work" >"$work/summary" || bad=1
says() { grep -Eq "$1" "$work/summary" || { echo "the summary does not say: $1"; bad=1; }; }
says 'memory-bound ops, bfloat16: of a copy +[0-9.]+ +>= 0.80'
says 'grouped products, float32: of a loop +[0-9.]+ +>= 1.00'
says "width 512: of PyTorch's tokens/s +1.500 +>= 1.30 +met"
says 'width 512: active parameters, of the ceiling +0.600 +>= 0.50 +met'
says "width 2048: of PyTorch's tokens/s +not measured +>= 1.30 +NOT MET"
says 'width 2048: active parameters, of the ceiling +0.400 +>= 0.50 +NOT MET'
[ $bad = 0 ] || cat "$work/summary"
exit $bad
