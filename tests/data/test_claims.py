#!/usr/bin/env python3
"""experiments/claim.py: the stages that claims compare are in their files, behind what they begin from; verdicts and the
figures of an extension are those of records made by hand. Needs nothing but Python."""
import json
import os
import re
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
EXPERIMENTS = os.path.join(ROOT, "experiments")
sys.path.insert(0, EXPERIMENTS)
import claim as claims  # noqa: E402
import claim_runs  # noqa: E402
from claim_figures import FIGURES  # noqa: E402

failures = []


def expect(condition, message):
    if not condition:
        failures.append(message)
        print("FAILED: " + message)


def check_stages(claim):
    """Every stage of a variant is in the claim's files, behind all that it begins from."""
    blocks = {**claim_runs.blocks_of(claim["config"])[1], **claim_runs.blocks_of(claim["stages"])[1]}
    for variant, stages in claim["variants"].items():
        missing = [s for s in stages if s not in blocks]
        expect(not missing, f"{claim['id']}, {variant}: no stages {missing}")
        wanted = claim_runs.needed(blocks, [s for s in stages if s in blocks])
        late = [s for s in wanted for word in re.findall(r" (?:from|tuned|base): (\w+)", blocks[s])
                if word not in wanted[:wanted.index(s)]]
        expect(not late, f"{claim['id']}, {variant}: {late} begin from stages that do not come before")


def check_claims():
    names = [n for n in sorted(os.listdir(EXPERIMENTS)) if os.path.exists(os.path.join(EXPERIMENTS, n, "claim.json"))]
    expect(len(names) > 20, f"claims: {names}")
    for name in names:
        claim = claim_runs.read_claim(os.path.join(EXPERIMENTS, name))
        if "stages" in claim:
            check_stages(claim)
        for rule in claim["compare"]:
            expect(rule["figure"] in FIGURES, f"{name}: no figure {rule['figure']}")
            expect({rule["of"], rule.get("against", rule["of"])} <= set(claim["variants"]), f"{name}: variants of {rule}")


def extended(stage, losses, share):
    return [{"stage": stage, "split": s + "_validation", "loss": loss, "new_experts": share} for s, loss in losses.items()]


def check_extension():
    """Text rose by 0.5, pictures by 0.25, speech fell by 1.5; three tokens in ten chose new experts."""
    run = (extended("tune", {"base": 2.5, "image": 3.25, "speech": 1.0}, 0.3)
           + extended("align", {"base": 2.0, "image": 3.0, "speech": 2.5}, 0))
    options = {"old": ["base", "image"], "modality": "speech"}
    for figure, value in (("forgetting", 0.375), ("learnt", 1.5), ("price", 0.25), ("new_share", 30), ("caption_loss", 1.0)):
        found = FIGURES[figure](run, options)
        expect(abs(found - value) < 1e-12, f"{figure}: {found}, expected {value}")


def timed(stage, seconds, count):
    steps = [{"seconds": {"step": s}, "tokens": {"speech": 6, "vocabulary": 4}} for s in seconds]
    return {"stage": stage, "steps": steps + [{"evaluation": {}}], "trained": count}


def check_cost():
    """Medians 1 and 3 of all steps of a kind, and not of the first run's."""
    run = [timed("timed_tune_1", [9, 9, 1], 20), timed("timed_full_1", [8, 8, 3], 50), timed("timed_full_2", [3, 3, 3], 50),
           timed("timed_tune_2", [1, 1, 1], 20)]
    for figure, value in (("step_ratio", 3), ("trained_ratio", 2.5)):
        found = FIGURES[figure](run, {})
        expect(abs(found - value) < 1e-12, f"{figure}: {found}, expected {value}")
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "manifest.json"), "w", encoding="utf-8") as file:
            json.dump({"groups": [{"name": "a", "trained": 3, "frozen": 5}, {"name": "b", "trained": 4, "frozen": 0}]}, file)
        expect(claim_runs.trained(folder) == 7, "a stage's trained parameters")


def check_verdicts():
    for want, mean, half, verdict in (("greater", 1, 0.5, "reproduces"), ("greater", 1, 2, "inconclusive"),
                                      ("greater", -1, 0.5, "refuted"), ("below", -1, 0.5, "reproduces"),
                                      ("below", 1, 0.5, "refuted"), ("shown", 1, 0.5, "shown")):
        found = claims.judge({"expect": want}, {"mean": mean, "half": half})
        expect(found == verdict, f"{mean} +- {half}, {want}: {found}, expected {verdict}")
    for verdicts, whole in (("reproduces shown", "reproduces"), ("refuted shown", "refuted"),
                            ("refuted reproduces shown", "refuted in part"), ("reproduces inconclusive", "inconclusive")):
        found = claims.overall([{"verdict": v} for v in verdicts.split()])
        expect(found == whole, f"{verdicts}: {found}, expected {whole}")
    found = claims.describe([1, 2, 3, 4, 5])
    expect(abs(found["half"] - 2.776 * 0.5 ** 0.5) < 1e-9, f"half width: {found}")


def main():
    check_claims()
    check_extension()
    check_cost()
    check_verdicts()
    print(f"{len(failures)} expectations failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
