#!/usr/bin/env python3
"""Makes the golden data of connectors that resample, in a tower and in a decoder: resampler.h5.

    python make_resampler.py [folder]

needs numpy, torch (CPU), h5py and transformers, as make_decoder.py. Groups as in golden.h5 and decoder.h5; the
mathematics: reference_resampler.py.
"""

import copy
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
import reference_resampler


def resampler(name, **settings):
    return golden.modality(name, **{"connector": "resampler", "positions": "none",
                                    "queries": 5, "depth": 2, "heads": 0, **settings})


def cases():
    """More queries than latents and fewer, widths of their own, absent items."""
    yield "resampled_tower", 41, golden.merged(golden.base(), {"data": {"modalities": [
        resampler("image", hidden=12, queries=3, heads=2), golden.modality("text"),
        resampler("audio", positions="rope", depth=1, normalize="rms")]}})
    yield "resampled", 42, golden.merged(decoder.base(), {"data": {"modalities": [
        resampler("image", hidden=8, queries=9),
        golden.modality("text", connector="mlp", hidden=9), resampler("audio", queries=2, depth=1)]}})


def is_decoder(config):
    return config["model"].get("kind") == "decoder"


def shapes(config):
    out = (decoder if is_decoder(config) else golden).shapes(config)
    for settings, (name, width, *_) in zip(config["data"]["modalities"], golden.MODALITIES):
        if settings["connector"] == "resampler":
            prefix = "connector.%s." % name
            out = {n: s for n, s in out.items() if not n.startswith(prefix)}
            out.update(reference_resampler.shapes(settings, config["model"], width, prefix))
    return out


def initial(config, draw):
    P = {}
    for name, shape in shapes(config).items():
        deviation = 0.3 if len(shape) == 1 else 0.4 if "router" in name else 1 / np.sqrt(shape[-1])
        values = (1.0 if name.endswith("norm.weight") else 0.0) + deviation * draw.normal(size=shape)
        if name == "log_scale":
            values[:] = np.log(10)
        P[name] = torch.from_numpy(values.astype(np.float32).astype(np.float64)).requires_grad_()
    return P


def make_batch(config, ids, latents, prompts, targets):
    modalities = config["data"]["modalities"]
    queries = [m["queries"] if m["connector"] == "resampler" else 0 for m in modalities]
    ready = []
    for m, settings in enumerate(modalities):
        shift, scale = reference.standardisation(np.concatenate(latents[m]), settings["normalize"])
        ready.append([torch.from_numpy((x - shift) * scale) for x in latents[m]])
    samples = range(config["optimizer"]["batch"])
    if is_decoder(config):
        return reference_decoder.Batch([(ids[i], -1, [x[i] for x in ready], prompts[i], targets[i])
                                        for i in samples], len(ready), queries)
    return reference.Batch([(ids[i], golden.LABELS[i], [x[i] for x in ready]) for i in samples], len(ready),
                           queries)


def run_case(seed, config, *data):
    batch, kind = make_batch(config, *data), reference_decoder if is_decoder(config) else reference
    P = initial(config, np.random.default_rng(seed))
    before = {n: p.detach().clone() for n, p in P.items()}
    optimizer = reference.Optimizer(config, P)
    outputs = decoder.token_losses if is_decoder(config) else golden.embeddings
    result = {"value": before, "embedding": outputs(config, P, batch)}
    for step, updates in enumerate(("update", "update_two")):
        model, parts = kind.evaluate(config, P, batch, step)
        if model.gaps["logit"] < 5e-5:
            return None, "near-ties %s" % model.gaps
        gradient = golden.differentiate(P, parts["loss"])
        parts["norm"], parts["clip"], parts["rate"] = optimizer.step()
        result[updates] = {n: p.detach() - before[n] for n, p in P.items()}
        if step == 0:
            result.update(parts=parts, gradient=gradient, gaps=model.gaps)
    result["parts"]["loss_after"] = parts["loss"]
    return result, None


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)
    golden.CONSUMED.clear()
    with tempfile.TemporaryDirectory() as scratch:  # the same latents as make_golden.py's and make_decoder.py's
        ids, of_tower = golden.make_latents(scratch)
        golden.ABSENT["text"] += (5,)
        _, of_decoder = golden.make_latents(scratch)
    prompts, targets = decoder.make_tokens()
    with h5py.File(os.path.join(folder, "resampler.h5"), "w") as file:
        for name, seed, config in cases():
            result, latents = None, of_decoder if is_decoder(config) else of_tower
            while result is None:
                result, trouble = run_case(seed, copy.deepcopy(config), ids, latents, prompts, targets)
                if trouble:
                    print("%s, seed %d: %s" % (name, seed, trouble))
                    seed += 100
            golden.write_case(file, name, config, result)
            golden.describe(name, result)


if __name__ == "__main__":
    main()
