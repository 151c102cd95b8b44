#!/usr/bin/env python3
"""Sets for experiments/storage/run, and the share of a step that a run waited for data.

    make_set.py features OUT.npy                4,800 samples of 16 rows of width 768, float16
    make_set.py plain IN.npy DIRECTORY          them in h5py's own uncompressed forms, chunked and contiguous
    make_set.py shards DIRECTORY COUNT          COUNT small shards of four samples
    make_set.py waiting NAME METRICS.jsonl      one JSON line: median of seconds.data / seconds.step

Needs numpy and h5py.
"""

import json
import os
import statistics
import sys

import h5py
import numpy as np

SAMPLES, ROWS, WIDTH, PER_SHARD = 4800, 16, 768, 1200


def features(path):
    """Normal-like numbers of 7 bits: they compress about as encoder outputs rounded to float16 do."""
    rng = np.random.RandomState(1)
    draw = rng.randint(-64, 64, size=(SAMPLES, ROWS, WIDTH)).astype(np.float32) / 32
    np.save(path, (draw * rng.randint(1, 5, size=draw.shape)).astype(np.float16))


def write(path, ids, offset, latent, **storage):
    with h5py.File(path, "w") as f:
        f.attrs.update(format="antiphon-latents", version=1, modality="image", encoder="none", dtype="float16",
                       width=latent.shape[1])
        f["id"], f["offset"] = ids, offset
        f.create_dataset("latent", data=latent, **storage)


def plain(source, directory):
    latent = np.load(source)
    for form, storage in (("plain-chunked", {"chunks": (341, WIDTH)}), ("plain-contiguous", {})):
        folder = os.path.join(directory, form, "train")
        os.makedirs(folder, exist_ok=True)
        for k in range(SAMPLES // PER_SHARD):
            part = latent[k * PER_SHARD:(k + 1) * PER_SHARD].reshape(-1, WIDTH)
            write(os.path.join(folder, "image-%05d.h5" % k), np.arange(PER_SHARD, dtype="u8") + k * PER_SHARD,
                  np.arange(PER_SHARD + 1, dtype="u8") * ROWS, part, **storage)


def shards(directory, count):
    folder = os.path.join(directory, "train")
    os.makedirs(folder, exist_ok=True)
    latent = np.ones((4, 8), np.float16)
    for k in range(count):
        write(os.path.join(folder, "image-%05d.h5" % k), np.arange(4, dtype="u8") + 4 * k, np.arange(5, dtype="u8"), latent)


def waiting(name, path):
    steps = [json.loads(line) for line in open(path)]
    seconds = [s["seconds"] for s in steps if "seconds" in s and isinstance(s["seconds"], dict)][3:]
    walls = [s.get("step", sum(v for k, v in s.items() if k != "step")) for s in seconds]
    share = [s["data"] / wall for s, wall in zip(seconds, walls)]
    print(json.dumps({"bench": "waiting", "run": name, "steps": len(share), "data_share_median": round(statistics.median(share), 6),
                      "data_share_mean": round(sum(s["data"] for s in seconds) / sum(walls), 6)}))


if __name__ == "__main__":
    what, arguments = sys.argv[1], sys.argv[2:]
    {"features": features, "plain": plain, "shards": lambda d, n: shards(d, int(n)), "waiting": waiting}[what](*arguments)
