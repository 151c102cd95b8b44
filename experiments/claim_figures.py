"""The figures that claims compare, by name: each is a number of the records of one run."""
import math
import random
import statistics


def last_evaluation(run):
    return [r for r in run if "evaluation" in r][-1]["evaluation"]


def training_steps(run):
    return [r for r in run if "evaluation" not in r]


def late_steps(run):
    """The last fifth of the training steps."""
    steps = training_steps(run)
    return steps[-max(1, len(steps) // 5):]


def mean_r1(run, _):
    """Recall at 1 over all directions on held-out data, in points."""
    return 100 * last_evaluation(run)["mean_r1"]


def mean_r10(run, _):
    """Recall at 10 over all directions on held-out data, in points."""
    return 100 * statistics.mean(d["r10"] for d in last_evaluation(run)["retrieval"].values())


def saw_tooth(run, _):
    """Recall at 1 of a direction where its own steps end, above the middle between where the other direction's end before
    and after that, in points; mean of both directions. Every evaluation lies between steps of the one and of the other."""
    ends, last = [], None
    for record in run:
        if "evaluation" in record:
            ends.append((last, {d: 100 * m["r1"] for d, m in record["evaluation"]["retrieval"].items()}))
        else:
            last = list(record["pairs"])[record["direction"]]
    teeth = []
    for (one, a), (own, b), (two, c) in zip(ends, ends[1:], ends[2:]):
        if own not in (one, two):
            teeth += [(1 if d == own else -1) * (b[d] - (a[d] + c[d]) / 2) for d in b]
    return statistics.mean(teeth)


def recall_gap(run, options):
    """Distance between the recalls at 1 of a direction and its opposite, in points: mean of the evaluations in the first
    (options["when"]: early) or the last fifth of the steps (late)."""
    steps, gaps = training_steps(run)[-1]["step"], []
    for record in run:
        when = "early" if record["step"] <= steps / 5 else "late" if record["step"] > 4 * steps / 5 else ""
        if "evaluation" in record and when == options["when"]:
            r1 = {tuple(d.split(":")): m["r1"] for d, m in record["evaluation"]["retrieval"].items()}
            gaps += [100 * abs(r1[a, b] - r1[b, a]) for a, b in r1 if a < b]
    return statistics.mean(gaps)


def gap_closed(run, _):
    """How much of the early distance between opposite directions is gone late, in points of recall at 1."""
    return recall_gap(run, {"when": "early"}) - recall_gap(run, {"when": "late"})


def directions_of(run, kind):
    """Recall at 1 at the end of the variant's first stage and before: [(now, before)] in points of its old directions, that
    is those of its second stage, or [now] of the others, its new ones."""
    now, before = (last_evaluation(r["steps"])["retrieval"] for r in run)
    if kind == "old":
        return [(100 * now[d]["r1"], 100 * m["r1"]) for d, m in before.items()]
    return [100 * m["r1"] for d, m in now.items() if d not in before]


def old_moved(run, _):
    """Recall at 1 of the old directions after the variant's first stage less that before it, in points."""
    return statistics.mean(now - before for now, before in directions_of(run, "old"))


def new_r1(run, _):
    """Recall at 1 of the directions that the variant's first stage has and its second has not, in points."""
    return statistics.mean(directions_of(run, "new"))


def step_over_share(run, options):
    """Processor time of a step of one of options["directions"] over that of a joint step of all, divided by their number."""
    found = run[0][options["directions"]]
    return found["one"] / found["joint"]


def encoder_over_query(run, options):
    """Time of the encoder of options["modality"] for an item over that of a query from its latents: connector and search."""
    found = run[0]
    return found[options["modality"]]["encoder"] / (found[options["modality"]]["connector"] + found["search"])


def success(run, options):
    """Share of the tokens of options["modality"] (all: of every token) that some expert took, late in training."""
    kept = tokens = 0
    for step in late_steps(run):
        for layer in step["layers"]:
            for name, m in layer["modalities"].items():
                if options["modality"] not in (name, "all"):
                    continue
                count = step["tokens"][name]
                kept, tokens = kept + m["success"] * count, tokens + count
    return 100 * kept / tokens


def worst_success(run, _):
    """The success rate of the modality that has the lowest one, late in training, in percent."""
    return min(success(run, {"modality": m}) for m in late_steps(run)[0]["tokens"])


def success_gap(run, options):
    """The success rate of all tokens less that of the worst-served modality, late in training, in points."""
    return success(run, {"modality": "all"}) - worst_success(run, options)


def busiest_expert(run, _):
    """Share of all choices that the busiest expert of a layer gets, mean of layers, late in training, in percent."""
    shares = [100 * max(layer["load"]) / sum(layer["load"]) for step in late_steps(run) for layer in step["layers"]]
    return statistics.mean(shares)


def importance(run, _):
    """The importance loss (squared variation of the summed gates), late in training."""
    return statistics.mean(step["router"]["importance"] for step in late_steps(run))


def entropy_margin(run, options):
    """H(mean p) - log S of the modality and layer where it is smallest, late in training. options["least"]: S_m."""
    margins = []
    for name, least in options["least"].items():
        for layer in range(len(late_steps(run)[0]["layers"])):
            values = [s["layers"][layer]["modalities"][name]["entropy_of_mean"] for s in late_steps(run)]
            margins.append(statistics.mean(values) - math.log(least))
    return min(margins)


def purity(run, _):
    """How much likelier than with shuffled modalities an expert's token is of the expert's main modality, on held-out
    data, mean of layers, in points. Modalities weigh the same, however many tokens they have."""
    gains = []
    draw = random.Random(0)
    for layer in last_evaluation(run)["layers"]:
        counts = [m["before"] for m in layer["modalities"].values()]
        shares = [[c / sum(row) for c in row] for row in counts if sum(row) > 0]
        real = sum(max(column) for column in zip(*shares)) / len(shares)
        total = [sum(column) for column in zip(*counts)]
        labels = [e for e, n in enumerate(total) for _ in range(n)]
        shuffled = []
        for _ in range(20):
            draw.shuffle(labels)
            rows, at = [], 0
            for row in counts:
                part, at = labels[at:at + sum(row)], at + sum(row)
                if part:
                    rows.append([part.count(e) / len(part) for e in range(len(total))])
            shuffled.append(sum(max(column) for column in zip(*rows)) / len(rows))
        gains.append(100 * (real - statistics.mean(shuffled)))
    return statistics.mean(gains)


def caption_loss(run, options):
    """Loss of a byte of held-out names, nats, of the variant's first stage, mean of the modalities or of one."""
    asked = options.get("modality")
    first = [r for r in run if r["stage"] == run[0]["stage"]]
    return statistics.mean(r["loss"] for r in first if asked in (None, r["split"].split("_")[0]))


def drop(run, options):
    """The caption loss of a modality of the variant's first stage less that of its stage number options["alone"], which
    has been trained on that modality alone."""
    stages = list(dict.fromkeys(r["stage"] for r in run))
    loss = {(r["stage"], r["split"].split("_")[0]): r["loss"] for r in run}
    return loss[stages[0], options["modality"]] - loss[stages[options["alone"]], options["modality"]]


def rise(run, modality):
    """The held-out loss of a modality (base: of text) after the variant's first stage less that after its last one, which
    came before it, in nats."""
    stages = list(dict.fromkeys(r["stage"] for r in run))
    loss = {r["stage"]: r["loss"] for r in run if r["split"].split("_")[0] == modality}
    return loss[stages[0]] - loss[stages[-1]]


def forgetting(run, options):
    """The rise of the held-out loss from before any extension, mean of the modalities options["old"], in nats."""
    return statistics.mean(rise(run, modality) for modality in options["old"])


def learnt(run, options):
    """The fall of the caption loss of options["modality"] since before any extension, in nats."""
    return -rise(run, options["modality"])


def price(run, options):
    """Forgetting for each nat that the caption loss of options["modality"] fell by."""
    return forgetting(run, options) / learnt(run, options)


def new_share(run, options):
    """Share of the held-out tokens of options["modality"] that choose an added expert, in percent: the mean over the
    extended layers after the variant's first stage."""
    return 100 * next(r["new_experts"] for r in run if r["split"].split("_")[0] == options["modality"])


def of_stages(run, kind):
    """Records of the stages with `kind` in their names: timed_tune_1, timed_full_2."""
    return [r for r in run if f"_{kind}_" in r["stage"]]


def step_ratio(run, _):
    """How many times as long as a step of stage 3 one of full fine-tuning takes: medians over the steps of all runs of a
    kind, which alternate, of the seconds of a token."""
    def cost(kind):
        return statistics.median(s["seconds"]["step"] / sum(s["tokens"].values())
                                 for r in of_stages(run, kind) for s in training_steps(r["steps"]))
    return cost("full") / cost("tune")


def trained_ratio(run, _):
    """How many times as many parameters full fine-tuning trains."""
    return of_stages(run, "full")[0]["trained"] / of_stages(run, "tune")[0]["trained"]


def loss_moved(run, _):
    """Largest relative difference of the loss of a step between the variant's two stages, in millionths, as long as all
    experts have equal loads: where a near-tie has fallen otherwise, the losses are those of other choices."""
    one, other = (training_steps(r["steps"]) for r in run)
    moved = [0.0]
    for a, b in zip(one, other, strict=True):
        if [layer["load"] for layer in a["layers"]] != [layer["load"] for layer in b["layers"]]:
            return 1e6 * max(moved) if a is not one[0] else math.inf
        moved.append(abs(a["loss"] - b["loss"]) / abs(b["loss"]))
    return 1e6 * max(moved)


def choices_moved(run, _):
    """Share of the choices of experts that fall on another expert in the one stage than in the other, summed over
    steps and layers by the experts' loads, in percent."""
    one, other = (training_steps(r["steps"]) for r in run)
    pairs = [(x, y) for a, b in zip(one, other, strict=True) for m, n in zip(a["layers"], b["layers"], strict=True)
             for x, y in zip(m["load"], n["load"], strict=True)]
    return 100 * sum(abs(x - y) for x, y in pairs) / 2 / sum(y for _, y in pairs)


FIGURES = {f.__name__: f for f in (mean_r1, mean_r10, saw_tooth, recall_gap, gap_closed, old_moved, new_r1, step_over_share,
                                   encoder_over_query, success, worst_success, success_gap, busiest_expert, importance,
                                   entropy_margin, purity, caption_loss, drop, forgetting, learnt, price, new_share,
                                   step_ratio, trained_ratio, loss_moved, choices_moved)}
