#!/usr/bin/env python3
"""Draws the metrics of a run.

    plot.py RUN_DIRECTORY [-o OUT_DIRECTORY]

Reads RUN_DIRECTORY/metrics.jsonl (of a run that has ended or is going on) and writes PNG files to OUT_DIRECTORY,
by default RUN_DIRECTORY/plots. Needs Python 3 and matplotlib. README.md tells what the figures show.
"""
import argparse
import json
import math
import os
import sys

# ---- reading ----


class Problem(Exception):
    """What a person can mend; printed without a trace."""


class Run:
    """Steps and evaluations by step; where a step is written twice the later line counts."""

    def __init__(self, directory, steps, evaluations):
        self.name = os.path.basename(os.path.abspath(directory))
        self.steps = [steps[s] for s in sorted(steps)]
        self.evaluations = [evaluations[s] for s in sorted(evaluations)]
        self.x = [line["step"] for line in self.steps]
        self.modalities = list(self.steps[-1].get("tokens", {}))
        self.layers = min(len(line.get("layers", [])) for line in self.steps)

    def series(self, *keys):
        """The value under nested keys, a step; NaN where it is missing or null."""
        return [number(line, keys) for line in self.steps]


def number(value, keys):
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return math.nan
    return value if isinstance(value, (int, float)) else math.nan


def read_run(directory):
    path = os.path.join(directory, "metrics.jsonl")
    steps, evaluations, torn = {}, {}, 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}; give the run.directory of a training run") from error
    for text in lines:
        try:
            line = json.loads(text)
            (evaluations if "evaluation" in line else steps)[int(line["step"])] = line
        except (ValueError, KeyError, TypeError):
            torn += 1
    if torn:
        print(f"plot.py: {path}: {torn} of {len(lines)} lines are not whole and are passed over", file=sys.stderr)
    if not steps:
        raise Problem(f"{path} holds no step yet")
    return Run(directory, steps, evaluations)


def smooth(values):
    """Centred mean over a twentieth of the run, for series that jump from batch to batch."""
    half = len(values) // 40
    if half == 0:
        return values
    out = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half):i + half + 1] if math.isfinite(v)]
        out.append(sum(window) / len(window) if window else math.nan)
    return out


# ---- style ----

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f"]  # Okabe and Ito
DASHES = ["-", "--", ":", "-."]
PHASES = ["data", "forward", "exchange", "loss", "backward", "reduce", "optimizer", "checkpoint"]


def load_matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise Problem("matplotlib is missing; on Debian: apt-get install python3-matplotlib") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
        "axes.axisbelow": True, "legend.edgecolor": "none", "legend.framealpha": 0.75,
        "legend.fontsize": 8, "lines.linewidth": 1.4,
        "figure.dpi": 130, "figure.constrained_layout.use": True})
    import matplotlib.pyplot as plt
    return plt


def colour(i):
    return COLOURS[i % len(COLOURS)]


def pretty(name):
    return name.replace(":", " → ")


def line(axes, x, y, label, i=0, smoothed=True, raw=True, **style):
    """A series; a faint raw line under its mean where that differs; a mark where there is one step only."""
    style = {"color": colour(i), **style}
    if not any(math.isfinite(v) for v in y):
        return
    marker = "o" if len(x) == 1 else None
    mean = smooth(y) if smoothed else y
    if mean is not y and raw:
        axes.plot(x, y, color=style["color"], alpha=0.2, linewidth=0.7)
    axes.plot(x, mean, label=label, marker=marker, **style)


def finish(axes, title, y, x="step", legend=True, columns=1):
    from matplotlib.ticker import MaxNLocator
    axes.set_title(title)
    axes.set_ylabel(y)
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    left, right = axes.get_xlim()
    if right - left < 2:  # a single step
        axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(ncol=columns)


def headroom(axes, share, columns):
    """Room for a legend above the curves of an axis that begins at 0."""
    axes.set_ylim(0, axes.get_ylim()[1] * (1 + share))
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles, names, ncol=columns, loc="upper left", fontsize=7.5, columnspacing=1.2, handlelength=1.5)


def nothing(axes, title, why):
    axes.set_title(title)
    axes.text(0.5, 0.5, why, ha="center", va="center", color="#777777", transform=axes.transAxes)
    axes.set_axis_off()


# ---- panels: each fills one axes ----


def panel_loss(axes, run):
    line(axes, run.x, run.series("loss"), "total", 7, color="black")
    line(axes, run.x, run.series("contrastive"), "contrastive", 0)
    for i, pair in enumerate(run.steps[-1].get("pairs", {})):
        line(axes, run.x, run.series("pairs", pair), pair.replace(":", " – "), i + 1, linestyle="--", linewidth=1.1)
    finish(axes, "Training loss", "loss [nat]")


def panel_router_loss(axes, run):
    drawn = False
    for i, term in enumerate(run.steps[-1].get("router", {})):
        values = run.series("router", term)
        if any(v > 0 for v in values):
            line(axes, run.x, [v if v > 0 else math.nan for v in values], term, i)
            drawn = True
    if not drawn:
        return nothing(axes, "Router losses", "no router loss")
    axes.set_yscale("log")
    finish(axes, "Router losses, weighted", "loss")


def panel_retrieval(axes, run):
    points = [e for e in run.evaluations if e["evaluation"].get("retrieval")]
    if not points:
        return nothing(axes, "Held-out R@1", "no evaluation yet")
    x = [e["step"] for e in points]
    directions = list(points[-1]["evaluation"]["retrieval"])
    for i, direction in enumerate(directions):
        y = [100 * number(e, ("evaluation", "retrieval", direction, "r1")) for e in points]
        axes.plot(x, y, marker="o", markersize=3.5, color=colour(i), label=pretty(direction))
    mean = [100 * number(e, ("evaluation", "mean_r1")) for e in points]
    axes.plot(x, mean, color="black", linewidth=2, marker="o", markersize=4, label="mean")
    chance = [100 * number(points[-1], ("evaluation", "retrieval", d, "chance_r1")) for d in directions]
    chance = [c for c in chance if math.isfinite(c)]
    if chance:
        axes.axhline(max(chance), color="#777777", linestyle=":", label=f"chance ({max(chance):.2g} %)")
    samples = points[-1]["evaluation"].get("samples", "?")
    finish(axes, f"Held-out R@1 ({samples} samples)", "R@1 [%]", legend=False)
    headroom(axes, 0.12 * math.ceil((len(directions) + 2) / 3), 3)


def panel_rate(axes, run):
    line(axes, run.x, run.series("rate"), "learning rate", 0, smoothed=False)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    finish(axes, "Learning rate", "learning rate", legend=False)


def panel_norm(axes, run):
    norm = run.series("gradient_norm")
    line(axes, run.x, norm, "gradient norm", 1)
    clipped = [n * c for n, c in zip(norm, run.series("clip")) if c < 1 and math.isfinite(n * c)]
    if clipped:
        axes.axhline(max(clipped), color="#777777", linestyle=":",
                     label=f"clipped to {max(clipped):.3g} in {100 * len(clipped) / len(norm):.0f} % of the steps")
    skipped = [s["step"] for s in run.steps if s.get("skipped")]
    for i, step in enumerate(skipped):
        axes.axvline(step, color="red", linewidth=0.7, label=f"{len(skipped)} skipped" if i == 0 else None)
    real = [n for n in norm if n > 0]
    if real and max(real) > 30 * min(real):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    finish(axes, "Gradient norm before clipping", "L2 norm")


def panel_throughput(axes, run):
    total = [0.0] * len(run.x)
    for i, modality in enumerate(run.modalities):
        values = run.series("tokens_per_second", modality)
        total = [t + v for t, v in zip(total, values)]
        line(axes, run.x, [v / 1000 for v in values], modality, i)
    if len(run.modalities) > 1:
        line(axes, run.x, [v / 1000 for v in total], "all", color="black")
    finish(axes, "Throughput", "thousand tokens/s", legend=False)
    headroom(axes, 0.12, 4)


def phase_seconds(run):
    """Milliseconds a step of each phase that took time, smoothed; what no phase accounts for is "other"."""
    known = [p for p in PHASES if any(v > 0 for v in run.series("seconds", p))]
    new = [p for p in run.steps[-1].get("seconds", {}) if p != "step" and p not in PHASES]
    phases = {p: [1000 * (v if math.isfinite(v) else 0) for v in smooth(run.series("seconds", p))] for p in known + new}
    whole = [1000 * v for v in smooth(run.series("seconds", "step"))]
    phases["other"] = [max(0, w - sum(phases[p][i] for p in phases)) for i, w in enumerate(whole)]
    return phases


def panel_time(axes, run):
    phases = phase_seconds(run)
    total = sum(sum(v) for v in phases.values()) or 1
    labels = [f"{p} {100 * sum(v) / total:.0f} %" for p, v in phases.items()]
    colours = [colour(i) if p != "other" else "#d0d0d0" for i, p in enumerate(phases)]
    if len(run.x) == 1:
        bottom = 0
        for (_, values), label, c in zip(phases.items(), labels, colours):
            axes.bar(run.x, values, bottom=bottom, width=0.5, color=c, label=label)
            bottom += values[0]
        axes.set_xlim(run.x[0] - 2, run.x[0] + 2)
    else:
        axes.stackplot(run.x, *phases.values(), labels=labels, colors=colours, linewidth=0)
        axes.set_xlim(run.x[0], run.x[-1])
        top = max(sum(v[i] for v in phases.values()) for i in range(len(run.x)))
        usual = sorted(sum(v[i] for v in phases.values()) for i in range(len(run.x)))[int(0.98 * (len(run.x) - 1))]
        axes.set_ylim(0, min(top, 1.5 * usual) * 1.05 or 1)
    finish(axes, "Where the time goes (rank 0)", "ms per step", legend=False)
    headroom(axes, 0.12 * math.ceil(len(phases) / 4), 4)


def layer_name(layer):
    return f"MoE layer {layer + 1}"


def panel_balance(axes, run):
    if run.layers == 0:
        return nothing(axes, "Expert load", "no MoE layer")
    for layer in range(run.layers):
        line(axes, run.x, run.series("layers", layer, "max_over_mean"), layer_name(layer), layer, raw=run.layers <= 3)
    axes.axhline(1, color="#777777", linestyle=":", label="balanced")
    finish(axes, "Busiest expert against the mean", "max / mean of tokens", columns=1 + run.layers // 5)


def panel_dead(axes, run):
    if run.layers == 0:
        return nothing(axes, "Dead experts", "no MoE layer")
    from matplotlib.ticker import MaxNLocator
    most = 0
    for layer in range(run.layers):
        values = run.series("layers", layer, "dead")
        most = max([most] + [v for v in values if math.isfinite(v)])
        line(axes, run.x, values, layer_name(layer), layer, linestyle=DASHES[layer % len(DASHES)])
    axes.set_ylim(-0.05 * max(most, 1), max(most, 1) * 1.05)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    finish(axes, "Experts without a token in a step", f"experts of {len(run.steps[-1]['layers'][0]['load'])}")


def health_panel(axes, run, keys, title, unit, factor=1.0):
    """A colour a modality. Up to three layers: one line each. More: their mean, in a band from least to greatest."""
    if run.layers == 0:
        return nothing(axes, title, "no MoE layer")
    from matplotlib.lines import Line2D
    handles = [Line2D([], [], color=colour(i), label=m) for i, m in enumerate(run.modalities)]
    for i, modality in enumerate(run.modalities):
        layers = [run.series("layers", n, "modalities", modality, *keys) for n in range(run.layers)]
        layers = [[factor * v for v in values] for values in layers]
        if run.layers > 3:
            at_step = list(zip(*[smooth(values) for values in layers]))
            axes.fill_between(run.x, [min(v) for v in at_step], [max(v) for v in at_step], color=colour(i), alpha=0.15,
                              linewidth=0)
            line(axes, run.x, [sum(v) / len(v) for v in at_step], None, i, smoothed=False)
            continue
        for n, values in enumerate(layers):
            line(axes, run.x, values, None, i, raw=run.layers * len(run.modalities) <= 6, linestyle=DASHES[n])
    if 1 < run.layers <= 3:
        handles += [Line2D([], [], color="#555555", linestyle=DASHES[n], label=layer_name(n))
                    for n in range(run.layers)]
    finish(axes, title + (f", mean and range of {run.layers} layers" if run.layers > 3 else ""), unit, legend=False)
    axes.legend(handles=handles, ncol=2 if len(handles) > 4 else 1)


def panel_success(axes, run):
    health_panel(axes, run, ("success",), "Tokens with an expert (success rate)", "% of tokens", 100)


def panel_dropped(axes, run):
    health_panel(axes, run, ("dropped",), "Tokens that no expert took", "% of tokens", 100)


def entropy_panel(axes, run, key, title):
    health_panel(axes, run, (key,), title, "entropy [nat]")
    if run.layers > 0:
        experts = len(run.steps[-1]["layers"][0]["load"])
        axes.axhline(math.log(experts), color="#777777", linestyle=":")


def panel_entropy(axes, run):
    entropy_panel(axes, run, "entropy", "Local: mean entropy H(p) of a token")


def panel_global(axes, run):
    entropy_panel(axes, run, "entropy_of_mean", "Global: entropy H(mean p) of a modality")


def panel_choices(axes, run):
    entropy_panel(axes, run, "entropy_of_choices", "Entropy of the choices")


def panel_gate(axes, run):
    health_panel(axes, run, ("gate", 0), "Mean gate of the first choice", "gate")


def panel_variation(axes, run):
    if run.layers == 0:
        return nothing(axes, "Importance", "no MoE layer")
    for layer in range(run.layers):
        line(axes, run.x, run.series("layers", layer, "importance_cv2"), layer_name(layer), layer, raw=run.layers <= 3)
    axes.set_ylim(bottom=0)
    finish(axes, "Importance: CV² over experts, all modalities", "variance / mean²", columns=1 + run.layers // 5)


def panel_marginal(axes, run):
    health_panel(axes, run, ("effective_experts",), "Experts in use: exp(entropy of the mean)", "experts")


# ---- heat maps ----


def assignments(run, layer):
    """[modality][expert]: tokens before capacity, summed over the last tenth of the steps, at least one."""
    last = run.steps[-max(1, len(run.steps) // 10):]
    experts = len(last[-1]["layers"][layer]["load"])
    rows = []
    for modality in run.modalities:
        row = [0] * experts
        for step in last:
            counts = step["layers"][layer]["modalities"].get(modality, {}).get("before", [])
            row = [a + b for a, b in zip(row, counts)] if len(counts) == experts else row
        rows.append(row)
    return rows, last[0]["step"], last[-1]["step"]


def panel_heat(axes, run, layer):
    rows, first, last = assignments(run, layer)
    share = [[100 * n / (sum(row) or 1) for n in row] for row in rows]
    most = max(max(row) for row in share) or 1
    image = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=most)
    experts = len(rows[0])
    if experts <= 16:
        for m, row in enumerate(share):
            for e, value in enumerate(row):
                axes.text(e, m, f"{value:.0f}", ha="center", va="center", fontsize=8,
                          color="white" if value > 0.6 * most else "#333333")
    axes.set_xticks(range(0, experts, max(1, math.ceil(experts / 16))))
    axes.set_yticks(range(len(run.modalities)), run.modalities)
    axes.grid(False)
    axes.set_xlabel("expert")
    span = f"step {last}" if first == last else f"steps {first}–{last}"
    axes.set_title(f"{layer_name(layer)}: % of a modality's tokens, {span}")
    return image


def draw_heat(plt, run):
    columns = 1 if run.layers <= 3 else 2
    rows = math.ceil(run.layers / columns)
    height = 0.9 + 0.32 * max(2, len(run.modalities))
    figure, axes = plt.subplots(rows, columns, figsize=(7.5 * columns, height * rows), squeeze=False)
    for n in range(rows * columns):
        axis = axes[n // columns][n % columns]
        if n >= run.layers:
            axis.set_axis_off()
            continue
        figure.colorbar(panel_heat(axis, run, n), ax=axis, label="% of tokens", pad=0.01)
    return figure


# ---- figures ----


def draw(plt, run, panels, columns, size=(6.2, 3.6)):
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    for n in range(rows * columns):
        axis = axes[n // columns][n % columns]
        if n < len(panels):
            panels[n](axis, run)
        else:
            axis.set_axis_off()
    return figure


def panel_last_heat(axes, run):
    panel_heat(axes, run, run.layers - 1)


FIGURES = {
    "loss": ([panel_loss, panel_router_loss], 2),
    "retrieval": ([panel_retrieval], 1, (7.5, 4.4)),
    "optimizer": ([panel_rate, panel_norm], 2),
    "throughput": ([panel_throughput, panel_time], 2),
    "load": ([panel_balance, panel_dead, panel_dropped, panel_variation], 2),
    "router": ([panel_success, panel_entropy, panel_global, panel_marginal, panel_choices, panel_gate], 3),
}
OVERVIEW = [panel_loss, panel_retrieval, panel_norm, panel_throughput, panel_time, panel_rate]
OVERVIEW_MOE = [panel_balance, panel_success, panel_last_heat]


def save(plt, figure, directory, name):
    path = os.path.join(directory, name + ".png")
    figure.savefig(path)
    plt.close(figure)
    print(path)


def draw_all(plt, run, directory):
    os.makedirs(directory, exist_ok=True)
    for name, (panels, *shape) in FIGURES.items():
        if run.layers > 0 or name not in ("load", "router"):
            save(plt, draw(plt, run, panels, *shape), directory, name)
    if run.layers > 0:
        save(plt, draw_heat(plt, run), directory, "experts")
    overview = draw(plt, run, OVERVIEW + (OVERVIEW_MOE if run.layers > 0 else []), 3, (5.6, 3.3))
    overview.suptitle(f"{run.name}, step {run.x[-1]}", fontsize=13, fontweight="bold")
    save(plt, overview, directory, "overview")


def main():
    parser = argparse.ArgumentParser(description="Draws the metrics of a run.")
    parser.add_argument("run", metavar="RUN_DIRECTORY", help="the run.directory of a training run")
    parser.add_argument("-o", metavar="OUT_DIRECTORY", help="where the PNG files go; default RUN_DIRECTORY/plots")
    arguments = parser.parse_args()
    try:
        run = read_run(arguments.run)
        draw_all(load_matplotlib(), run, arguments.o or os.path.join(arguments.run, "plots"))
    except Problem as problem:
        sys.exit(f"plot.py: {problem}")
    except OSError as error:
        sys.exit(f"plot.py: cannot write {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
