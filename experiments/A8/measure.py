#!/usr/bin/env python3
"""What a query costs with the encoder and without, one item at a time, on one thread.

usage: measure.py ANTIPHON RUN

RUN is a trained connector of the glyph set. Printed, as JSON, in seconds for an item of the validation split: of each
modality the encoder that made its latents (with tokenizing; without drawing, reading or speaking), and the connector's
forward pass toward another one; and the search of one query among GALLERY stored keys. Each is the shortest of five
rounds. Needs the encoders of data/glyphs/README.md (Rebuilding)."""
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "data", "glyphs"))
import build                                                    # noqa: E402

ITEMS, ROUNDS, GALLERY = 48, 5, 5000
QUERIES = {"image": "image:text", "text": "text:image", "speech": "speech:text"}


def encoders(samples):
    """{modality: (encoder, inputs)}."""
    return {"image": (build.ImageEncoder(), [build.render(s.thing, s.render) for s in samples]),
            "text": (build.TextEncoder(), [build.text_of(s.thing, s.form) for s in samples]),
            "speech": (build.SpeechEncoder(), [build.speak(s.thing.name, build.VOICES[s.voice]) for s in samples])}


def shortest_round(encoder, inputs):
    encoder([inputs[0]])                                        # what is made at the first call is not counted
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for item in inputs:
            encoder([item])
        rounds.append(time.perf_counter() - start)
    return min(rounds) / len(inputs)


def bench(antiphon, *words):
    said = subprocess.run([antiphon, "bench", *words, "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(said)


def connector(antiphon, run, direction):
    """A forward pass of one item."""
    with tempfile.TemporaryDirectory() as folder:
        said = bench(antiphon, "embed", run, "--query", direction, "-o", os.path.join(folder, "queries.h5"), "--set",
                     "evaluate.batch=1", "--set", "run.threads=1")
    return said["forward_seconds"] / said["samples"], said["width"]


def main():
    antiphon, run = sys.argv[1:3]
    build.need("torch", "the encoders").set_num_threads(1)
    samples = build.plan(build.find_things())["validation"][:ITEMS]
    found = {}
    for modality, (encoder, inputs) in encoders(samples).items():
        seconds, width = connector(antiphon, run, QUERIES[modality])
        found[modality] = {"encoder": shortest_round(encoder, inputs), "connector": seconds}
    search = bench(antiphon, "search", "--rows", str(GALLERY), "--width", str(width), "--threads", "1")
    print(json.dumps({**found, "search": search["one_seconds"]}))


if __name__ == "__main__":
    main()
