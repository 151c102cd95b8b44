#!/usr/bin/env python3
"""What a step of one direction takes beside a joint step: two short runs, by turns.

usage: measure.py ANTIPHON RUN

RUN is a directory of the program's own, whose configuration is trained again: in turn and jointly, over six directions and
over two. The two runs of a pair are made in one time, a slice of the one and a slice of the other, while the other stands
still: whatever else the machine does meets both. Printed, as JSON, in seconds for each number of directions: a step of one
direction, mean of directions, and a joint step over their number. Each is the lower quartile of steps, most of which hold no
change of turns. They are trained on the held-out samples, which have all modalities: all steps are of one size."""
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

SLICE = 0.7                      # seconds for each direction: a joint step is well below a slice
STEPS = {6: 36, 2: 90}           # of each direction, and joint ones
SETTINGS = ["run.threads=1", "run.device=cpu", "data.train=validation", "evaluate.interval=0", "evaluate.at_end=false",
            "checkpoint.interval=0", "run.log=100000"]
TWO = ["data.use=[image,text]", "objective.directions=[image:text,text:image]"]


def start(antiphon, config, directory, settings):
    words = [antiphon, "train", config]
    for setting in SETTINGS + settings + [f"run.directory={directory}"]:
        words += ["--set", setting]
    with open(directory + ".txt", "w", encoding="utf-8") as said:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said)


def by_turns(runs, seconds):
    """Lets each run go on for `seconds` while the others stand still, until all have ended."""
    for run in runs[1:]:
        run.send_signal(signal.SIGSTOP)
    while any(run.poll() is None for run in runs):
        for run in runs:
            if run.poll() is not None:
                continue
            run.send_signal(signal.SIGCONT)
            try:
                run.wait(seconds)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGSTOP)
        time.sleep(0.01)
    if any(run.returncode for run in runs):
        sys.exit(f"a run ended with status {[run.returncode for run in runs]}")


def seconds_of(directory):
    """Lower quartile of a step's seconds, mean of what is trained: a direction, or all of them."""
    found = {}
    with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as lines:
        for step in list(map(json.loads, lines))[2:]:
            found.setdefault(step["direction"], []).append(step["seconds"]["step"])
    return statistics.mean(sorted(s)[len(s) // 4] for s in found.values())


def pair(antiphon, config, directions, settings):
    with tempfile.TemporaryDirectory() as folder:
        one, joint = os.path.join(folder, "one"), os.path.join(folder, "joint")
        by_turns([start(antiphon, config, one, settings + [f"run.steps={STEPS[directions] * directions}"]),
                  start(antiphon, config, joint, settings + [f"run.steps={STEPS[directions]}", "schedule.alternate=none"])],
                 SLICE * directions)
        return {"one": seconds_of(one), "joint": seconds_of(joint) / directions}


def main():
    antiphon, run = sys.argv[1:3]
    config = os.path.join(run, "config.yaml")
    print(json.dumps({"6": pair(antiphon, config, 6, []), "2": pair(antiphon, config, 2, TWO)}))


if __name__ == "__main__":
    main()
