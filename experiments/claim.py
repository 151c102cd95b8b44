#!/usr/bin/env python3
"""Tests one published claim: trains every variant with every seed, compares them seed by seed, writes the result.

usage: claim.py CLAIM_DIRECTORY [--jobs N] [--seeds N] [--build DIRECTORY] [--runs DIRECTORY]
       claim.py --table              rebuilds experiments/RESULTS.md from the results that are there

CLAIM_DIRECTORY holds claim.json: the claim, what was published, a configuration, settings of each variant, and which
figures are compared (`compare`: functions of claim_figures.py by name). Runs lie in DIRECTORY (runs/claims), under a name
made of all that decides them, so that claims share runs and a stopped claim goes on where it was. Each run has one
thread; N of them run side by side. Written: result.json and plot.png in CLAIM_DIRECTORY, and a row of RESULTS.md.
Where claim.json names `stages`, a file of further stages for the configuration, a variant is a list of stages: there is
one run a seed, of all stages that the variants need, and each of them is measured on the splits that claim.json names.
`ranks` says how many ranks train a stage, where it is not one. Where it names a script to `measure`, that is given the
program and the run's directory, by the Python that ENCODERS names (this one), and prints what the figures are made of.
Python's standard library, and matplotlib for the plot."""
import argparse
import json
import math
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

from claim_figures import FIGURES
from claim_runs import read_claim, read_runs, read_stages

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

# ---- statistics ----

# Quantiles of Student's t: two-sided 95 %, and one-sided 80 % (for the difference that would have been detected).
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 19: 2.093}
T_80 = {1: 1.376, 2: 1.061, 3: 0.978, 4: 0.941, 5: 0.920, 6: 0.906, 7: 0.896, 8: 0.889, 9: 0.883, 14: 0.868, 19: 0.861}


# Upper 2.5 % point of F with n and n degrees of freedom.
F_975 = {2: 39.0, 3: 15.44, 4: 9.60, 5: 7.15, 6: 5.82, 7: 4.99, 8: 4.43, 9: 4.03, 14: 2.98, 19: 2.53}


def quantile(table, freedom):
    return table[max(k for k in table if k <= freedom)]


def describe(values):
    """Mean, half width of its 95 % interval, and the difference that this many seeds detect four times in five."""
    n = len(values)
    if n < 2:
        sys.exit("at least two seeds are needed")
    error = statistics.stdev(values) / math.sqrt(n)
    return {"mean": statistics.mean(values), "half": quantile(T_975, n - 1) * error, "values": values,
            "detectable": (quantile(T_975, n - 1) + quantile(T_80, n - 1)) * error}


def judge(rule, found):
    """What an interval says of "greater than `than`" or of "below `than`"; "shown" expects nothing."""
    if rule["expect"] == "shown":
        return "shown"
    low, high = found["mean"] - found["half"], found["mean"] + found["half"]
    than = rule.get("than", 0)
    if rule["expect"] == "greater":
        return "reproduces" if low > than else "refuted" if high < than else "inconclusive"
    return "reproduces" if high < than else "refuted" if low > than else "inconclusive"


def compare_spread(rule, of, against):
    """Whether the variance over seeds of one variant is below that of another, by the ratio of the two."""
    ratio = statistics.variance(of) / max(statistics.variance(against), 1e-300)
    bound = quantile(F_975, len(of) - 1)
    verdict = "reproduces" if ratio < 1 / bound else "refuted" if ratio > bound else "inconclusive"
    return {"rule": rule, "of": describe(of), "against": describe(against), "ratio": ratio, "bound": bound,
            "verdict": verdict}


def compare_one(rule, runs, seeds):
    """One comparison: the figure of variant `of`, or its difference from that of `against`, seed by seed."""
    figure, options = FIGURES[rule["figure"]], rule.get("options", {})
    of = [figure(runs[rule["of"], s], options) for s in seeds]
    result = {"rule": rule, "of": describe(of)}
    values = of
    if "against" in rule:
        against = [figure(runs[rule["against"], s], options) for s in seeds]
        if rule["expect"] == "narrower":
            return compare_spread(rule, of, against)
        result["against"] = describe(against)
        values = [a - b for a, b in zip(of, against)]
        if statistics.mean(against) != 0:
            result["relative"] = 100 * statistics.mean(values) / statistics.mean(against)
    result["found"] = describe(values)
    result["verdict"] = judge(rule, result["found"])
    return result


def overall(parts):
    verdicts = [p["verdict"] for p in parts if p["verdict"] != "shown"]
    if all(v == "reproduces" for v in verdicts):
        return "reproduces"
    if any(v == "refuted" for v in verdicts):
        return "refuted" if all(v == "refuted" for v in verdicts) else "refuted in part"
    return "inconclusive"


# ---- writing ----


ACROSS = 6  # panels of a plot side by side


def title_of(rule):
    what = rule["figure"].replace("_", " ")
    if "modality" in rule.get("options", {}):
        what += " of " + rule["options"]["modality"]
    if "directions" in rule.get("options", {}):
        what += f" of {rule['options']['directions']} directions"
    if "when" in rule.get("options", {}):
        what = f"{rule['options']['when']} {what}"
    return what + f", {rule['of']}" + (f" - {rule['against']}" if "against" in rule else "")


def sentence(part):
    rule = part["rule"]
    if rule["expect"] == "narrower":
        return (f"variance over seeds of {rule['figure'].replace('_', ' ')}, {rule['of']} / {rule['against']}: "
                f"{part['ratio']:.2g} (a difference would be seen beyond 1/{part['bound']:.2g} or {part['bound']:.2g})")
    found = part["found"]
    text = f"{title_of(rule)}: {found['mean']:+.3g} ± {found['half']:.2g}"
    if "against" in rule:
        text += f" ({part['of']['mean']:.4g} against {part['against']['mean']:.4g}"
        relative = part.get("relative")
        text += ")" if relative is None else f", {relative:+.{0 if abs(relative) >= 1 else 1}f} %)"
    elif "than" in rule:
        text += f" (expected {'above' if rule['expect'] == 'greater' else 'below'} {rule['than']:g})"
    if part["verdict"] == "inconclusive":
        text += f"; {found['detectable']:.2g} would have been seen"
    return text


def draw(result, path):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is missing", file=sys.stderr)
        return
    parts = result["parts"]
    across = min(ACROSS, len(parts))
    down = math.ceil(len(parts) / across)
    figure, axes = plt.subplots(down, across, figsize=(1 + 3.2 * across, 0.3 + 3.3 * down), squeeze=False)
    for axis in axes.flat[len(parts):]:
        axis.set_visible(False)
    for axis, part in zip(axes.flat, parts):
        columns = [(part["rule"]["of"], part["of"])]
        if "against" in part["rule"]:
            columns.append((part["rule"]["against"], part["against"]))
        for x, (_, values) in enumerate(columns):
            axis.plot([x] * len(values["values"]), values["values"], "o", color="C0", alpha=0.5)
            axis.errorbar([x], [values["mean"]], yerr=[values["half"]], fmt="s", color="C3", capsize=6)
        if len(columns) == 2:
            for a, b in zip(columns[0][1]["values"], columns[1][1]["values"]):
                axis.plot([0, 1], [a, b], color="0.8", zorder=0)
        if "than" in part["rule"] and len(columns) == 1:
            axis.axhline(part["rule"]["than"], color="0.6", linestyle="--")
        axis.set_xticks(range(len(columns)), [name for name, _ in columns])
        axis.set_xlim(-0.5, len(columns) - 0.5)
        axis.set_title(title_of({**part["rule"], "of": "", "against": ""}).rstrip(" ,-").replace("_", " "), fontsize=9)
        axis.set_xlabel(part["verdict"], fontsize=9)
    figure.suptitle(f"{result['id']}: {result['claim']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table():
    rows = ["# Results", "",
            "Each row is written by `experiments/<claim>/run`; the table by `experiments/claim.py --table`. Differences are between",
            "runs of equal seed; ± is half of the 95 % interval of the mean. `details` names the data, seeds and models.", "",
            "| claim | published | measured here | verdict |", "|---|---|---|---|"]
    details = ["", "## Details", ""]
    for name in sorted(os.listdir(HERE)):
        path = os.path.join(HERE, name, "result.json")
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        measured = "<br>".join(sentence(p) for p in result["parts"])
        rows.append(f"| [{result['id']}]({name}/) {result['claim']} | {result['published']} | {measured} | {result['verdict']} |")
        details.append(f"**{result['id']}**: {result['data']}; seeds {', '.join(map(str, result['seeds']))}; `{result['config']}` with"
                       + (f" stages of `{result['stages']}`" if "stages" in result else ""))
        for variant, settings in result["variants"].items():
            model = result["models"].get(variant, "")
            details.append(f"- {variant}: {', '.join(f'`{s}`' for s in settings) or 'as it is'}" + (f" ({model})" if model else ""))
        if result.get("settings"):
            details.append(f"- all: {', '.join(f'`{s}`' for s in result['settings'])}")
        details += [result["note"], ""] if result.get("note") else [""]
    with open(os.path.join(HERE, "RESULTS.md"), "w", encoding="utf-8") as file:
        file.write("\n".join(rows + details).rstrip() + "\n")


def run_claim(arguments):
    claim = read_claim(arguments.claim)
    seeds = list(range(1, (arguments.seeds or claim["seeds"]) + 1))
    antiphon = os.path.join(os.path.abspath(arguments.build), "launcher", "antiphon")
    if not os.access(antiphon, os.X_OK):
        sys.exit(f"no {antiphon}: build first (cmake --preset release && cmake --build build/release)")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        read = read_stages if "stages" in claim else read_runs
        runs, models = read(claim, seeds, antiphon, os.path.abspath(arguments.runs), pool)
    parts = [compare_one(rule, runs, seeds) for rule in claim["compare"]]
    kept = {k: claim[k] for k in ("id", "claim", "published", "data", "config", "variants", "note", "settings", "stages")
            if k in claim}
    result = {**kept, "seeds": seeds, "models": models, "parts": parts, "verdict": overall(parts)}
    with open(os.path.join(arguments.claim, "result.json"), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    draw(result, os.path.join(arguments.claim, "plot.png"))
    table()
    for part in parts:
        print(sentence(part))
    print(f"{claim['id']}: {result['verdict']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", nargs="?")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, help="1 to this; without: what claim.json says")
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "release"))
    parser.add_argument("--runs", default=os.path.join(ROOT, "runs", "claims"))
    arguments = parser.parse_args()
    if arguments.table:
        table()
    elif arguments.claim:
        run_claim(arguments)
    else:
        parser.error("name a claim's directory, or --table")


if __name__ == "__main__":
    main()
