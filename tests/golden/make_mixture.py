#!/usr/bin/env python3
"""Makes the golden data of mixtures for test_golden, as make_golden.py and make_decoder.py do: see
reference_mixture.py. The latents are theirs, and stay where they are.

    python make_mixture.py [folder]

needs numpy, torch (CPU), h5py and transformers (which make_decoder.py imports).

    mixture.h5                             groups as in golden.h5 and, of decoders, in decoder.h5, and with
      balance    attribute, float64        the weighted balance loss
"""

import copy
import os
import sys
import tempfile

import h5py
import numpy as np
import torch

import make_decoder
import make_golden as golden
import reference
import reference_mixture

NO_LOSSES = {"importance": 0.0, "load": 0.0, "z": 0.0}


def cases():
    def tower(moe, objective, **changes):
        return golden.merged(golden.base(), {"model": {"kind": "tower", "layers": 3, "moe": moe}, **changes,
                                             "objective": {**NO_LOSSES, **objective}})

    def decoder(moe, objective, **changes):
        return golden.merged(make_decoder.base(), {"model": {"moe": moe}, **changes,
                                                   "objective": {**NO_LOSSES, **objective}})

    yield "unequal", 31, tower(
        {"layer_experts": [3, 5], "added": [0, 2], "added_bias": True, "choose": 2, "gate": "renormalised",
         "noise": 1.0, "dispatch": "capacity", "capacity": "0.95"},
        {"balance": 0.6, "balance_scope": "global", "balance_shares": "first", "importance": 0.3, "load": 0.2,
         "z": 0.05},
        data={"modalities": [golden.modality("image", local=0.1, experts=4.0, **{"global": 0.4}),
                             golden.modality("text", local=0.3, experts=3.7, **{"global": 0.5}),
                             golden.modality("audio")]})
    yield "by_input", 32, tower(
        {"added": [1, 0], "calibration": "multiply", "calibration_renormalize": False, "choose": 2, "noise": 1.0},
        {"balance": 0.6, "balance_scope": "local", "balance_shares": "all"})
    yield "by_weight", 33, decoder(
        {"layer_experts": [4, 5], "added": [2, 1], "calibration": "add", "calibration_renormalize": True,
         "group_samples": 2},
        {"balance": 0.6, "balance_scope": "local", "balance_shares": "first"})
    yield "drawn", 34, decoder(
        {"layer_experts": [5, 3], "second_noise": "gumbel", "gate": "softmax"},
        {"balance": 0.6, "balance_scope": "global", "balance_shares": "all"}, optimizer={"batch": 8})


def shapes(config):
    """Those of equal layers, with each layer's own experts and columns."""
    model, moe = config["model"], config["model"]["moe"]
    decodes = model["kind"] == "decoder"
    out = {n: s for n, s in (make_decoder if decodes else golden).shapes(config).items()
           if ".router." not in n and ".experts." not in n}
    C, F, mixtures = model["width"], moe["hidden"], 0
    gated = 2 if model["activation"] == "swiglu" else 1
    for layer in range(model["layers"]):
        block = "blocks.%d." % layer
        if not reference.is_moe(moe["layers"], model["layers"], layer):
            continue
        E, added = reference_mixture.experts_of(config, mixtures)
        mixtures += 1
        out[block + "router.weight"] = (E - added, C)
        if added:
            out[block + "router.added.weight"] = (added, C)
        if added and moe.get("added_bias"):
            out[block + "router.added.bias"] = (added,)
        if added and moe.get("calibration", "none") != "none":
            out[block + "calibration.in.weight"] = (16, E if moe["calibration"] == "add" else C)
            out[block + "calibration.out.weight"] = (E, 16)
        for e in range(E):
            out[block + "experts.%d.in.weight" % e] = (F * gated, C)
            out[block + "experts.%d.out.weight" % e] = (C, F)
    return out


def initial(config, draw):
    P = {}
    for name, shape in shapes(config).items():
        deviation = 0.3 if len(shape) == 1 else 0.4 if "router" in name else 1 / np.sqrt(shape[-1])
        if name == "embedding.weight":
            deviation = 0.7
        if name.endswith("calibration.out.weight"):
            deviation = 0.1  # most weights stay away from the bound, and some do not
        values = (1.0 if name.endswith("norm.weight") else 0.0) + deviation * draw.normal(size=shape)
        if name == "log_scale":
            values[:] = np.log(10)
        P[name] = torch.from_numpy(values.astype(np.float32).astype(np.float64)).requires_grad_()
    return P


def evaluation(config, P, batch):
    """Embeddings [M, B, Z], or the loss of each token [1, B, 8], without noise and drops."""
    config = copy.deepcopy(config)
    config["model"]["moe"].update(noise=0.0, second_noise="none", dispatch="dropless")
    if config["model"]["kind"] == "decoder":
        model = reference_mixture.Decoder(config, P, batch, 0)
        out = np.zeros((1, len(batch.samples), make_decoder.MOST))
        for (i, j, _, _), loss in zip(batch.predictions, model.losses):
            out[0, i, j] = loss.item()
        return out
    model = reference_mixture.Tower(config, P, batch, 0)
    nothing = np.zeros(config["model"]["embedding"])
    return np.array([[model.z[m][i].detach().numpy() if i in model.z[m] else nothing
                      for i in range(len(batch.samples))] for m in range(batch.M)])


def run_case(seed, config, batch):
    P = initial(config, np.random.default_rng(seed))
    before = {n: p.detach().clone() for n, p in P.items()}
    optimizer = reference.Optimizer(config, P)
    result = {"value": before, "embedding": evaluation(config, P, batch)}
    for step, updates in enumerate(("update", "update_two")):
        model, parts = reference_mixture.evaluate(config, P, batch, step)
        if model.gaps["logit"] < 5e-5 or model.gaps["priority"] < 2e-5:
            return None, "near-ties %s" % model.gaps
        gradient = golden.differentiate(P, parts["loss"])
        parts["norm"], parts["clip"], parts["rate"] = optimizer.step()
        result[updates] = {n: p.detach() - before[n] for n, p in P.items()}
        if step == 0:
            result.update(parts=parts, gradient=gradient, gaps=model.gaps)
    result["parts"]["loss_after"] = parts["loss"]
    return result, None


def batches(folder):
    """Makes a batch of a configuration, of a tower's or of a decoder's latents."""
    absent = dict(golden.ABSENT)
    ids, latents = golden.make_latents(os.path.join(folder, "tower"))
    golden.ABSENT["text"] += (5,)
    decoder = golden.make_latents(os.path.join(folder, "decoder")) + make_decoder.make_tokens()
    golden.ABSENT.update(absent)
    return lambda config: (make_decoder.make_batch(config, 0, *decoder) if config["model"]["kind"] == "decoder"
                           else golden.make_batch(config, 0, ids, latents))


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, h5py.File(os.path.join(folder, "mixture.h5"), "w") as file:
        batch_of = batches(scratch)
        for name, seed, config in cases():
            result = None
            while result is None:
                result, trouble = run_case(seed, copy.deepcopy(config), batch_of(config))
                if trouble:
                    print("%s, seed %d: %s" % (name, seed, trouble))
                    seed += 100
            golden.write_case(file, name, config, result)
            file[name].attrs["balance"] = golden.number(result["parts"]["balance"])
            golden.describe(name, result)
            print("  balance", golden.number(result["parts"]["balance"]))


if __name__ == "__main__":
    main()
