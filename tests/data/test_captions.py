#!/usr/bin/env python3
"""The decoder set of the glyphs (data/glyphs/captions.py) says what the glyph set says, keeps what is held out apart, and
feeds the recipes of experiments/unimoe and experiments/moextend from their first stages to names that can be read.

    test_captions.py ANTIPHON READ_SHARDS_DIRECTORY
"""
import json
import os
import re
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy as np
    import zstandard  # noqa: F401  (captions.py needs it)
except ImportError as error:
    print(f"skipped: {error}; needs h5py, numpy, zstandard")
    sys.exit(77)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "experiments"))
import claim_runs  # noqa: E402

GLYPHS = os.path.join(ROOT, "data", "glyphs")
MODALITIES = ("image", "speech", "text")
BEGIN, END = 2, 3
CONTROLS = {"unimoe": [], "moextend": ["full", "extend_all", "tune_all", "extend_copy_below", "tune_copy_below"]}
failures = []


def expect(condition, message):
    if not condition:
        failures.append(message)
        print("FAILED: " + message)


def sequences(file, name):
    tokens, at = file[name + "_token"][...], file[name + "_offset"][...].astype(int)
    return [tokens[a:b].tolist() for a, b in zip(at, at[1:])]


def read_split(folder):
    """[(id, prompt, response without its end, number of the modality or -1, its rows)] of all shards."""
    samples = []
    for number in range(len(os.listdir(folder)) // 3):
        files = [h5py.File(os.path.join(folder, f"{m}-{number:05d}.h5"), "r") for m in MODALITIES]
        ids = [f["id"][...].tolist() for f in files]
        expect(ids[0] == ids[1] == ids[2], f"{folder}: modalities hold the same ids")
        expect(sequences(files[0], "prompt") == sequences(files[2], "prompt"), f"{folder}: they hold the same prompts")
        rows = [(f["latent"][...], f["offset"][...].astype(int)) for f in files]
        for i, (prompt, target) in enumerate(zip(sequences(files[1], "prompt"), sequences(files[1], "target"))):
            there = [m for m, (_, at) in enumerate(rows) if at[i + 1] > at[i]]
            marks = [-1 - t for t in prompt if t < 0]
            expect(there == marks, f"{folder}, sample {ids[0][i]}: marks {marks}, latents of {there}")
            expect(prompt[0] == BEGIN and target[-1] == END, f"{folder}, sample {ids[0][i]}: begins and ends")
            latent = rows[there[0]][0][rows[there[0]][1][i]:rows[there[0]][1][i + 1]] if there else None
            samples.append((ids[0][i], prompt, bytes(target[:-1]).decode(), there[0] if there else -1, latent))
    expect(len({s[0] for s in samples}) == len(samples), f"{folder}: ids are unique")
    return samples


def original(read_shards, split):
    """{(id, number of the modality): (rows, name)} of the glyph set, by a reader that shares nothing with captions.py."""
    found = {}
    for number in range(6 if split == "train" else 1):
        for m, modality in enumerate(MODALITIES):
            with h5py.File(os.path.join(GLYPHS, split, f"{modality}-{number:05d}.h5"), "r") as file:
                rows, at = read_shards.read_dataset(file["latent"]), file["offset"][...].astype(int)
                for i, (sample, key) in enumerate(zip(file["id"][...].tolist(), file["key"][...])):
                    if at[i + 1] > at[i]:
                        found[sample, m] = rows[at[i]:at[i + 1]], key.decode().split(" | ")[0]
    return found


def check_set(out, read_shards):
    splits = {s: read_split(os.path.join(out, s)) for s in sorted(os.listdir(out)) if not s.startswith(".")}
    for kind in ("train", "validation"):
        source = original(read_shards, kind)
        for m, modality in enumerate(MODALITIES):
            samples = splits[modality + ("_validation" if kind == "validation" else "")]
            expect(len(samples) == sum(k[1] == m and "(unnamed)" not in v[1] for k, v in source.items()),
                   f"{modality}, {kind}: {len(samples)} samples")
            for number, _, said, _, latent in samples:
                rows, key = source[number // 4, m]
                expect(np.array_equal(rows, latent) and key.endswith(" " + said), f"{modality}, {kind}: sample {number}")
    held_out = {s[2] for s in splits["image_validation"]}
    for split in ("base", "image", "speech", "text"):
        named = {said for _, prompt, said, _, _ in splits[split] if bytes(t for t in prompt if t > 0).endswith(b"name:")}
        expect(len(named) > 1000 and not held_out & named, f"{split}: held-out names: {sorted(held_out & named)[:3]}")
    sizes = {s: len(v) for s, v in splits.items()}
    expect(sizes["mixture"] == sizes["image"] + sizes["speech"], "mixture is image and speech")
    expect(sizes["uneven"] == sizes["image"] + sizes["few"] and sizes["few"] == sizes["image"] // 10, "uneven, few")
    expect(sizes["old"] == sizes["base"] + sizes["image"] and {s[3] for s in splits["old"]} == {-1, 0},
           "old is base and image, without speech")
    expect({s[3] for s in splits["base"]} == {-1} and sizes["base"] > 5000, "base has tokens alone")


def one_sign(text):
    """Decoders differ in how many signs they put for bytes that are no character."""
    return re.sub("\ufffd+", "\ufffd", text)


def check_recipe(antiphon, out, work, name, split):
    """Two steps of every stage of a recipe, of its own file and of the controls that claims compare with it, then names for
    what is held out."""
    folder = os.path.join(ROOT, "experiments", name)
    head, blocks = claim_runs.blocks_of(os.path.join(folder, "glyphs.yaml"))
    controls = claim_runs.blocks_of(os.path.join(folder, "controls.yaml"))[1]
    expect(not set(blocks) & set(controls), f"{name}: no control has the name of a stage")
    blocks.update({stage: controls[stage] for stage in CONTROLS[name]})
    text, count = re.subn(r"run\.steps=\d+", "run.steps=2", head + "\nstages:\n" + "".join(blocks.values()))
    expect(count > 0, f"{name}: stages have steps of their own")
    config, run = os.path.join(work, name + ".yaml"), os.path.join(work, name)
    with open(config, "w", encoding="utf-8") as file:
        file.write(text)
    settings = ["--set", "run.threads=1"]
    subprocess.run([antiphon, "train", config, "--set", f"run.directory={run}", "--set", f"data.path={out}", "--set",
                    "run.steps=2"] + settings, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    said = subprocess.run([antiphon, "eval", os.path.join(run, "tune"), "--split", split, "--generate", "6",
                           "--temperature", "9", "--stop", str(END)] + settings, check=True, stdout=subprocess.PIPE).stdout
    lines = [json.loads(line) for line in said.splitlines()]
    expect(len(lines) == 336 and all(len(line["tokens"]) <= 6 for line in lines), f"{name}: names of 336 things")
    expect(any(ord(c) > 127 and c != "\ufffd" for line in lines for c in line["text"]), f"{name}: some characters of two bytes")
    for line in lines:
        expect(one_sign(line["text"]) == one_sign(bytes(line["tokens"]).decode(errors="replace")), f"{name}: {line}")


def main():
    antiphon, readers = os.path.abspath(sys.argv[1]), sys.argv[2]
    sys.path.insert(0, readers)
    import read_shards
    with tempfile.TemporaryDirectory() as work:
        out = os.path.join(work, "captions")
        subprocess.run([sys.executable, os.path.join(GLYPHS, "captions.py"), "--out", out], check=True,
                       stdout=subprocess.DEVNULL)
        check_set(out, read_shards)
        check_recipe(antiphon, out, work, "unimoe", "image_validation")
        check_recipe(antiphon, out, work, "moextend", "speech_validation")
    print(f"{len(failures)} expectations failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
