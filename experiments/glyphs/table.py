#!/usr/bin/env python3
"""Held-out retrieval of several runs side by side, from their last evaluations.

usage: table.py RUN TITLE [RUN TITLE ...]"""
import json
import sys


def last_evaluation(run):
    found = None
    with open(run + "/metrics.jsonl", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if "evaluation" in record:
                found = record["evaluation"]
    if found is None:
        sys.exit(f"{run} holds no evaluation")
    return found


def main(arguments):
    if len(arguments) < 2 or len(arguments) % 2:
        sys.exit(__doc__)
    runs = [(title, last_evaluation(run)) for run, title in zip(arguments[::2], arguments[1::2])]
    first = runs[0][1]
    print(f"retrieval among {first['samples']} held-out things, R@1 / R@5 / R@10 in percent")
    print(f"{'':18}{'chance R@1':>12}" + "".join(f"{title:>24}" for title, _ in runs))
    for direction in first["retrieval"]:
        row = f"{direction.replace(':', ' -> '):18}{100 * first['retrieval'][direction]['chance_r1']:>12.2f}"
        for _, evaluation in runs:
            r = evaluation["retrieval"][direction]
            cell = " / ".join(f"{100 * r[k]:.1f}" for k in ("r1", "r5", "r10"))
            row += f"{cell:>24}"
        print(row)
    print(f"{'mean R@1':18}{'':>12}" + "".join(f"{100 * e['mean_r1']:>24.2f}" for _, e in runs))


main(sys.argv[1:])
