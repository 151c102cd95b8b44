#!/usr/bin/env python3
"""Makes the golden data of a decoder with adapters over a frozen base, as make_decoder.py does without: lora.h5.

    python make_lora.py [folder]

needs numpy, torch (CPU), h5py and transformers, as make_decoder.py, whose latents (decoder/train) it reads. The other
side multiplies by W and by A and B one after the other; here W + alpha / r B A is formed first and multiplied with, so
that merging is compared too. Adapters begin away from B = 0, where A would have no gradient.
"""

import copy
import fnmatch
import os
import sys
import tempfile

import h5py
import numpy as np
import torch

import make_decoder as decoder
import make_golden as golden
import reference
import reference_decoder

LORA = [{"parameters": "blocks.*.attention.*", "rank": 3, "alpha": 6.0},
        {"parameters": "blocks.*.experts.*", "rank": 2, "alpha": 5.0},
        {"parameters": "blocks.1.feed_forward.in", "rank": 4, "alpha": 4.0}]
FROZEN = ["embedding.*", "output.*", "*norm*", "blocks.1.feed_forward.out.*", "connector.audio.*"]


def make_config():
    config = golden.merged(decoder.base(), {
        "data": {"modalities": [golden.modality("image", positions="none"),
                                golden.modality("text", connector="mlp", hidden=9),
                                golden.modality("audio", positions="none", normalize="rms")]},
        "optimizer": {"frozen": FROZEN}})
    config["model"]["lora"] = LORA
    return config


def entry_of(name):
    """The first entry that names a map, by its matrix."""
    for entry in LORA:
        if fnmatch.fnmatchcase(name[:-len(".weight")], entry["parameters"]):
            return entry
    return None


def add_adapters(P, draw):
    """The adapters' parameters, and scale, A and B of each matrix."""
    adapters = {}
    for name in [n for n in P if n.endswith(".weight")]:
        entry = entry_of(name)
        if entry is None:
            continue
        pair = []
        for side, shape in (("a", (entry["rank"], P[name].shape[1])), ("b", (P[name].shape[0], entry["rank"]))):
            values = (0.2 * draw.normal(size=shape)).astype(np.float32).astype(np.float64)
            P["%s.lora_%s.weight" % (name[:-len(".weight")], side)] = torch.from_numpy(values).requires_grad_()
            pair.append("%s.lora_%s.weight" % (name[:-len(".weight")], side))
        adapters[name] = (entry["alpha"] / entry["rank"], *pair)
    return adapters


def merged(P, adapters):
    out = dict(P)
    for name, (scale, a, b) in adapters.items():
        out[name] = P[name] + scale * P[b] @ P[a]
    return out


def run_case(seed, config, *data):
    batch = decoder.make_batch(config, 0, *data)
    draw = np.random.default_rng(seed)
    P = decoder.initial(config, draw)
    adapters = add_adapters(P, draw)
    trained = {n: p for n, p in P.items()
               if n not in adapters and ("lora_" in n or not any(fnmatch.fnmatchcase(n, f) for f in FROZEN))}
    before = {n: p.detach().clone() for n, p in P.items()}
    optimizer = reference.Optimizer(config, trained)
    result = {"value": before, "embedding": decoder.token_losses(config, merged(P, adapters), batch)}
    for step, updates in enumerate(("update", "update_two")):
        model, parts = reference_decoder.evaluate(config, merged(P, adapters), batch, step)
        if model.gaps["logit"] < 5e-5:
            return None, "near-ties %s" % model.gaps
        gradient = golden.differentiate(P, parts["loss"])
        for name in set(P) - set(trained):
            gradient[name] = torch.zeros_like(P[name])
        parts["norm"], parts["clip"], parts["rate"] = optimizer.step()
        result[updates] = {n: p.detach() - before[n] for n, p in P.items()}
        if step == 0:
            result.update(parts=parts, gradient=gradient, gaps=model.gaps)
    result["parts"]["loss_after"] = parts["loss"]
    print("  %d of %d numbers trained" % (sum(p.numel() for p in trained.values()),
                                          sum(p.numel() for p in P.values())))
    return result, None


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)
    golden.CONSUMED.update(decoder.CONSUMED)
    golden.ABSENT["text"] += (5,)
    with tempfile.TemporaryDirectory() as scratch:  # the same latents as make_decoder.py's
        ids, latents = golden.make_latents(scratch)
    prompts, targets = decoder.make_tokens()
    config, seed, result = make_config(), 31, None
    while result is None:
        result, trouble = run_case(seed, copy.deepcopy(config), ids, latents, prompts, targets)
        if trouble:
            print("seed %d: %s" % (seed, trouble))
            seed += 100
    with h5py.File(os.path.join(folder, "lora.h5"), "w") as file:
        golden.write_case(file, "lora", config, result)
    golden.describe("lora", result)


if __name__ == "__main__":
    main()
