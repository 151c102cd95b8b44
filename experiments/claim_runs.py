"""What claim.py has the program do: the runs of a claim, and what they recorded."""
import hashlib
import json
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# ---- runs ----


def read_claim(directory):
    with open(os.path.join(directory, "claim.json"), encoding="utf-8") as file:
        claim = json.load(file)
    claim["directory"] = directory
    return claim


def settings_of(claim, variant, seed):
    common = [f"run.seed={seed}", "run.threads=1", "run.device=cpu", "checkpoint.keep=1"]
    return common + claim.get("settings", []) + ([] if "stages" in claim else claim["variants"][variant])


def run_directory(claim, variant, seed, runs):
    with open(os.path.join(ROOT, claim["config"]), "rb") as file:
        decides = file.read() + "\n".join(sorted(settings_of(claim, variant, seed))).encode()
    return os.path.join(runs, hashlib.sha256(decides).hexdigest()[:16])


def records(directory):
    with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def finished(directory):
    return os.path.exists(os.path.join(directory, "finished"))


def train(claim, variant, seed, antiphon, runs):
    """The run's directory. A run that was stopped is the same command again."""
    directory = run_directory(claim, variant, seed, runs)
    if not finished(directory):
        os.makedirs(directory, exist_ok=True)
        words = [antiphon, "train", claim["config"]]
        for setting in settings_of(claim, variant, seed) + [f"run.directory={directory}", "evaluate.at_end=true"]:
            words += ["--set", setting]
        with open(os.path.join(directory, "said.txt"), "w", encoding="utf-8") as said:
            status = subprocess.call(words, cwd=ROOT, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        if status != 0:
            sys.exit(f"{variant}, seed {seed}: antiphon ended with status {status}; see {directory}/said.txt")
        with open(os.path.join(directory, "finished"), "w", encoding="utf-8"):
            pass
    print(f"{claim['id']}: {variant}, seed {seed}: done", flush=True)
    return directory


def model_of(directory, stage=None):
    """What the program says of the model's parameters: how many, how many a token meets, how many are frozen."""
    with open(os.path.join(directory, "said.txt"), encoding="utf-8") as said:
        lines = [line.strip() for line in said if stage is None or line.startswith(f"[{stage}] ")]
    counts = [line.split(";")[0].split("] ")[-1] for line in lines if " M active, " in line]
    return counts[-1] if counts else ""


# ---- stages of one run ----


def blocks_of(path):
    """A file's text before its stages, and the text of each stage by name, in order."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        head, stages = file.read().split("\nstages:\n")
    blocks = re.split(r"^(?=  - name: )", stages, flags=re.MULTILINE)[1:]
    return head, {re.match(r"  - name: (\w+)", block).group(1): block for block in blocks}


def needed(blocks, wanted):
    """The stages in `wanted` and all that they begin from, in order."""
    found, queue = set(), list(wanted)
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            sources = re.findall(r"^ +(?:from|base|slots|connectors|tuned): (.*)", blocks[name], flags=re.MULTILINE)
            queue += [word for word in re.findall(r"\w+", " ".join(sources)) if word in blocks]
    return [name for name in blocks if name in found]


def train_stages(claim, seed, antiphon, runs):
    """The directory of the run of a seed; its stages are in directories of their own. What is done is not done again."""
    head, blocks = blocks_of(claim["config"])
    blocks.update(blocks_of(claim["stages"])[1])
    decides = "\n".join([head] + sorted(settings_of(claim, None, seed)))
    directory = os.path.join(runs, hashlib.sha256(decides.encode()).hexdigest()[:16])
    os.makedirs(directory, exist_ok=True)
    stages = [stage for stages in claim["variants"].values() for stage in stages]
    ranks = {stage: claim.get("ranks", {}).get(stage, 1) for stage in stages}
    for count in sorted(set(ranks.values())):
        path = os.path.join(directory, f"{os.path.basename(os.path.abspath(claim['directory']))}-{count}.yaml")
        with open(path, "w", encoding="utf-8") as file:
            wanted = needed(blocks, [stage for stage in stages if ranks[stage] == count])
            file.write(head + "\nstages:\n" + "".join(blocks[name] for name in wanted))
        words = ["mpirun", "--oversubscribe", "-n", str(count)] if count > 1 else []
        words += [antiphon, "train", path]
        for setting in settings_of(claim, None, seed) + [f"run.directory={directory}"]:
            words += ["--set", setting]
        with open(os.path.join(directory, "said.txt"), "a", encoding="utf-8") as said:
            status = subprocess.call(words, cwd=ROOT, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        if status != 0:
            sys.exit(f"seed {seed}: antiphon ended with status {status}; see {directory}/said.txt")
    print(f"{claim['id']}: seed {seed}: done", flush=True)
    return directory


def measure(antiphon, directory, stage, split):
    """{stage, split, loss}: the loss of a response token of the split, at the stage's end, and of an extended model the
    share of its tokens at added experts, `new_experts`. Kept beside the stage."""
    path = os.path.join(directory, stage, f"loss-{split}.json")
    if not os.path.exists(path):
        words = [antiphon, "eval", os.path.join(directory, stage), "--split", split, "--json", "--set", "run.threads=1"]
        said = json.loads(subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)["evaluation"]
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump({"stage": stage, "split": split, "loss": said["next_token"],
                       "new_experts": said.get("new_experts", 0)}, file)
        os.replace(path + ".part", path)
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def trained(directory):
    """How many parameters a stage trains."""
    with open(os.path.join(directory, "manifest.json"), encoding="utf-8") as file:
        return sum(group["trained"] for group in json.load(file)["groups"])


# ---- what a script measures ----


def measured(claim, directory, antiphon):
    """[What the claim's script prints of the trained run, a JSON object]. Kept beside the run."""
    path = os.path.join(directory, f"measured-{claim['id']}.json")
    if not os.path.exists(path):
        words = [os.environ.get("ENCODERS", sys.executable), claim["measure"], antiphon, directory]
        said = json.loads(subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(said, file)
        os.replace(path + ".part", path)
    with open(path, encoding="utf-8") as file:
        return [json.load(file)]


# ---- what a claim compares ----


def read_runs(claim, seeds, antiphon, where, pool):
    """({(variant, seed): records}, {variant: what its model is}) of one run for each. The records are its metrics, or
    where the claim names a script, what that measures, one run after another."""
    wanted = [(v, s) for s in seeds for v in claim["variants"]]
    found = dict(zip(wanted, pool.map(lambda w: train(claim, *w, antiphon, where), wanted)))
    read = {w: measured(claim, d, antiphon) if "measure" in claim else records(d) for w, d in found.items()}
    return read, {v: model_of(found[v, seeds[0]]) for v in claim["variants"]}


def read_stages(claim, seeds, antiphon, where, pool):
    """The same of stages of one run for each seed; records are those of `measure`, stage by stage, and without splits
    {stage, steps, trained}."""
    found = dict(zip(seeds, pool.map(lambda s: train_stages(claim, s, antiphon, where), seeds)))

    def of_stage(directory, stage):
        if not claim["splits"]:
            where = os.path.join(directory, stage)
            return [{"stage": stage, "steps": records(where), "trained": trained(where)}]
        return [measure(antiphon, directory, stage, split) for split in claim["splits"]]

    runs = {(v, s): [record for stage in stages for record in of_stage(found[s], stage)]
            for s in seeds for v, stages in claim["variants"].items()}
    return runs, {v: model_of(found[seeds[0]], stages[0]) for v, stages in claim["variants"].items()}
