#!/usr/bin/env python3
"""What the measurements of experiments/gpu/run say about the bars, from the files that it leaves.

    summary.py RESULTS        prints a table and writes RESULTS/summary.json

Bars (each a ratio inside one run): memory-bound kernels at 0.8 of a copy; products of experts no slower than a loop of
plain ones, whatever the skew; a step of 1.3 times PyTorch's tokens/s and of half the matmul ceiling by active
parameters. A bar whose measurements are missing is said to be so, and does not count as met.
"""

import json
import os
import sys

OF_COPY, OF_LOOP, OF_PEER, OF_CEILING = 0.8, 1.0, 1.3, 0.5
CHOSEN = "streams"  # the form of grouped products that training uses


def lines(path):
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.startswith("{")]


def entry(bar, value, least, note=""):
    return {"bar": bar, "value": value, "least": least, "met": value is not None and value >= least, "note": note}


def least_of(bar, shares, least):
    """shares: (value, name); the smallest counts, and all below the bar are named."""
    below = sorted(name for value, name in shares if value < least)
    value, name = min(shares, default=(None, ""))
    return entry(bar, value, least, "below: " + ", ".join(below) if below else name)


def kernels(found):
    """The slowest memory-bound op and grouped product of each type."""
    out = []
    for kind in ("bfloat16", "float32"):
        typed = [k for k in found if k.get("type") == kind]
        shares = [(k["of_copy"], k["op"]) for k in typed if "of_copy" in k]
        out.append(least_of(f"memory-bound ops, {kind}: of a copy", shares, OF_COPY))
        grouped = [k for k in typed if k["op"] == "gemm_grouped" and k["by"] == CHOSEN]
        loops = [(k["of_loop"], f"{k['form']} {k['skew']}") for k in grouped]
        out.append(least_of(f"grouped products, {kind}: of a loop", loops, OF_LOOP))
    return out


def steps(found):
    """Each width on one rank, against PyTorch's best time of the same shape that keeps float32 masters."""
    out = []
    for own in [s for s in found if s.get("bench") == "step" and s["ranks"] == 1]:
        width = own["width"]
        others = [p for p in found if p.get("bench") == "torch step" and p["width"] == width and not p["pure"]]
        best = max((p["tokens_per_second"] for p in others), default=None)
        ratio = own["tokens_per_second"] / best if best else None
        out.append(entry(f"step, width {width}: of PyTorch's tokens/s", ratio, OF_PEER))
        out.append(entry(f"step, width {width}: active parameters, of the ceiling", own["active_share"], OF_CEILING))
    return out


def main():
    if len(sys.argv) != 2 or not os.path.isdir(sys.argv[1]):
        print("usage: summary.py RESULTS", file=sys.stderr)
        return 2
    results = sys.argv[1]
    bars = kernels(lines(os.path.join(results, "kernels.jsonl"))) + steps(lines(os.path.join(results, "steps.jsonl")))
    with open(os.path.join(results, "summary.json"), "w", encoding="utf-8") as file:
        json.dump(bars, file, indent=1)
    for bar in bars:
        value = "not measured" if bar["value"] is None else f"{bar['value']:.3f}"
        state = "met" if bar["met"] else "NOT MET"
        print(f"{bar['bar']:60s} {value:>12s}  >= {bar['least']:.2f}  {state:8s} {bar['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
