#!/usr/bin/env python3
"""What a step of one direction costs beside a joint step.

usage: measure.py ANTIPHON RUN

RUN is a directory of the program's own, whose configuration is trained again for some steps: in turn and jointly, over six
directions and over two. Printed, as JSON, in processor seconds for each number of directions: a step of one direction, mean
of directions, and a joint step over their number. Processor time, since what else a machine does lengthens long steps more
often than short ones; with one thread the two kinds of time are otherwise one. It is the difference of a longer and a
shorter run, without what starting takes; of runs that are made REPEATS times the cheapest counts, since shared caches make
them dearer, never cheaper. Steps are trained on the held-out samples, which have all modalities: all are of one size."""
import json
import os
import subprocess
import sys
import tempfile

SHORT, LONG = 2, {6: 22, 2: 62}  # steps of each direction, and joint ones
REPEATS = 2
SETTINGS = ["run.threads=1", "run.device=cpu", "data.train=validation", "evaluate.interval=0", "evaluate.at_end=false",
            "checkpoint.interval=0", "run.log=100000"]
TWO = ["data.use=[image,text]", "objective.directions=[image:text,text:image]"]
JOINT = ["schedule.alternate=none"]


def processor_seconds(antiphon, config, steps, settings):
    """Of a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        words = [antiphon, "train", config]
        for setting in SETTINGS + settings + [f"run.steps={steps}", f"run.directory={folder}"]:
            words += ["--set", setting]
        run = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode != 0:
        sys.exit(f"{' '.join(words)} ended with status {run.returncode}")
    return usage.ru_utime + usage.ru_stime


def pair(antiphon, config, directions, settings):
    """Seconds of a direction's share of the steps."""
    steps = (SHORT, LONG[directions])
    runs = {("one", n): (n * directions, settings) for n in steps}
    runs.update({("joint", n): (n, settings + JOINT) for n in steps})
    rounds = [{kind: processor_seconds(antiphon, config, *run) for kind, run in runs.items()} for _ in range(REPEATS)]
    least = {kind: min(r[kind] for r in rounds) for kind in runs}
    shares = (steps[1] - steps[0]) * directions
    return {kind: (least[kind, steps[1]] - least[kind, steps[0]]) / shares for kind in ("one", "joint")}


def main():
    antiphon, run = sys.argv[1:3]
    config = os.path.join(run, "config.yaml")
    print(json.dumps({"6": pair(antiphon, config, 6, []), "2": pair(antiphon, config, 2, TWO)}))


if __name__ == "__main__":
    main()
