#!/usr/bin/env python3
"""Makes the golden data of test_golden: latent shards, and for each case what PyTorch (float64, autograd)
computes from them: see reference.py.  Run again only when the mathematics changes:

    python make_golden.py [folder]

needs numpy, torch (CPU) and h5py.  The seeds are fixed, so it writes the same numbers every time.

    train/<modality>-<NNNNN>.h5    sixteen samples in two shards
    golden.h5                      one group per case:
      attributes  config           text; JSON is YAML
                  consumed         samples of the first epoch that lie before the batch
                  scalars          see SCALARS
      names       bytes [N, 96]    of the parameters
      sizes       int64 [N]        numbers of each
      value       float32 [sum]    initial parameters, one after another
      gradient    float64 [sum]    of the loss, before clipping
      update      float64 [sum]    what one AdamW step adds
      update_two  float64 [sum]    what two steps on the same batch add
      pair        float64 [P]      contrastive loss of each pair
      sums        float64 [layers, M, 3 + 2 E]
      counts      int64   [layers, M, 2 E + 2]
      embedding   float64 [M, B, Z] of an evaluation (no noise, no drops); zeros where a modality is absent;
                  of a connector the queries and keys of its first direction
"""

import copy
import json
import math
import os
import sys

import h5py
import numpy as np
import torch

import reference
import reference_connector

SCALARS = ("loss", "contrastive", "importance", "load", "z", "local", "global", "scale", "norm", "clip",
           "rate", "loss_after")
ENTRY = 96

# name, width, most rows, dtype, typical size, filter
MODALITIES = (("image", 12, 8, "float16", 1.0, {"compression": "gzip", "shuffle": True}),
              ("text", 7, 4, "float32", 0.46, {}),
              ("audio", 20, 6, "bfloat16", 16.0, {"compression": "gzip"}))
SAMPLES, SHARD = 16, 8
# Samples that lack a modality; the rest have all three.
ABSENT = {"image": (5,), "text": (2, 11), "audio": (0, 5, 6, 7, 8, 13)}
LABELS = (3, -1, 3, 7, -1, 9, 9, 3, 7, -1, -1, 0, 1, 0, 2, 4)


# --- the latents -------------------------------------------------------------------------------------

def stored(values, dtype):
    """What a shard holds, and the numbers that it means."""
    values = values.astype(np.float32)
    if dtype == "bfloat16":
        bits = ((values.view(np.uint32) + np.uint32(0x8000)) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    kept = values.astype(dtype)
    return kept, kept.astype(np.float32)


def write_shard(path, name, dtype, ids, labels, offsets, latent, options):
    with h5py.File(path, "w") as file:
        for key, text in (("format", "antiphon-latents"), ("modality", name), ("encoder", "golden"),
                          ("dtype", dtype)):
            file.attrs.create(key, text, dtype=h5py.string_dtype("utf-8"))
        file.attrs.create("version", 1, dtype=np.int32)
        file.attrs.create("width", latent.shape[1], dtype=np.int32)
        file["id"] = np.asarray(ids, np.uint64)
        file["label"] = np.asarray(labels, np.int32)
        file["offset"] = np.asarray(offsets, np.uint64)
        file.create_dataset("latent", data=latent, chunks=(min(5, len(latent)), latent.shape[1]), **options)


def make_latents(folder):
    """Writes the shards; returns per modality the rows of each sample."""
    draw = np.random.default_rng(20220606)
    os.makedirs(folder, exist_ok=True)
    ids = [1000 + 37 * i % 101 for i in range(SAMPLES)]
    latents = []
    for name, width, most, dtype, size, options in MODALITIES:
        rows = [0 if i in ABSENT[name] else int(draw.integers(1, most + 1)) for i in range(SAMPLES)]
        rows[4] = most
        first = np.concatenate([[0], np.cumsum(rows)])
        values = size * (draw.normal(size=(first[-1], width)) + 0.7 * draw.normal(size=width))
        values[:, 3] = 0.1  # a constant feature
        bits, numbers = stored(values, dtype)
        for shard in range(SAMPLES // SHARD):
            part = slice(shard * SHARD, (shard + 1) * SHARD)
            offsets = first[part.start:part.stop + 1]
            write_shard(os.path.join(folder, "%s-%05d.h5" % (name, shard)), name, dtype, ids[part],
                        LABELS[part], offsets - offsets[0], bits[offsets[0]:offsets[-1]], options)
        latents.append([numbers[first[i]:first[i + 1]].astype(np.float64) for i in range(SAMPLES)])
    return ids, latents


def make_batch(config, consumed, ids, latents):
    """The samples after the first `consumed`, in file order; a batch runs on over the end of the set."""
    ready = []
    for m, settings in enumerate(config["data"]["modalities"]):
        shift, scale = reference.standardisation(np.concatenate(latents[m]), settings["normalize"])
        ready.append([torch.from_numpy((x - shift) * scale) for x in latents[m]])
    order = [(consumed + i) % SAMPLES for i in range(config["optimizer"]["batch"])]
    return reference.Batch([(ids[i], LABELS[i], [x[i] for x in ready]) for i in order], len(ready))


# --- the cases ---------------------------------------------------------------------------------------

CONSUMED = {"absent": 5, "connector": 11}  # before the batch, where it is not the first of the set


def modality(name, **settings):
    return {"name": name, "connector": "linear", "hidden": 0, "positions": "learned", "length": 8,
            "normalize": "standard", "local": 0.0, "global": 0.0, "experts": 0.0, **settings}


def base():
    return {
        "run": {"seed": 7, "steps": 10, "device": "cpu", "threads": 1},
        "data": {"path": "golden", "shuffle": 0, "modalities": [modality(m[0]) for m in MODALITIES]},
        "model": {"width": 16, "layers": 2, "heads": 4, "kv_heads": 0, "head_width": 0, "hidden": 12,
                  "embedding": 10, "activation": "swiglu", "norm_epsilon": 1e-3, "rope_base": 100.0,
                  "dense": False,
                  "moe": {"layers": "every 2", "experts": 4, "choose": 1, "hidden": 8, "gate": "softmax",
                          "dispatch": "dropless", "capacity": "1", "group_samples": 4, "priority": "gate",
                          "noise": 0.0}},
        "objective": {"pairs": [], "scale": 9.0, "largest_scale": 100.0, "importance": 0.3, "load": 0.2,
                      "z": 0.05},
        # An epsilon as large as the gradients: otherwise the first step of Adam is their sign, which
        # rounding decides where a gradient is zero but for rounding.
        "optimizer": {"batch": 16, "schedule": "cosine", "rate": 0.01, "min_rate": 0.001, "warmup": 0.25,
                      "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 0.01, "clip": 1000.0}}


def merged(config, changes):
    for key, value in changes.items():
        config[key] = merged(config.get(key, {}), value) if isinstance(value, dict) else value
    return config


def cases():
    def case(**changes):
        return merged(base(), changes)

    yield "dropless", 1, case()
    yield "priority", 2, case(
        data={"modalities": [modality("image"), modality("text", normalize="rms"),
                             modality("audio", normalize="rms", positions="none")]},
        model={"moe": {"layers": "second half", "choose": 2, "dispatch": "capacity", "capacity": "0.835"}},
        objective={"scale": 9.0, "largest_scale": 9.5}, optimizer={"clip": 2.5})
    yield "order", 3, case(
        model={"moe": {"layers": "0,1", "choose": 2, "dispatch": "capacity", "capacity": "0.95",
                       "priority": "order", "gate": "renormalised", "group_samples": 2}})
    yield "entropy", 4, case(
        data={"modalities": [modality("image", local=0.1, experts=4.0, **{"global": 0.4}),
                             modality("text", local=0.3, experts=3.7, connector="mlp", hidden=9,
                                      positions="none", **{"global": 0.5}),
                             modality("audio", local=0.2, experts=1.25, positions="rope",
                                      **{"global": 0.6})]},
        model={"layers": 3, "kv_heads": 2, "head_width": 6, "activation": "gelu",
               "moe": {"choose": 2, "gate": "renormalised"}})
    yield "noise", 5, case(
        data={"modalities": [modality("image", normalize="none"), modality("text", local=0.1),
                             modality("audio")]},
        model={"activation": "gelu_tanh", "kv_heads": 1, "embedding": 0,
               "moe": {"layers": "all", "choose": 2, "noise": 1.0, "dispatch": "capacity",
                       "capacity": "1.05"}},
        objective={"pairs": ["image:text", "audio:image"]}, optimizer={"clip": 3.0, "warmup": 2.0})
    # Samples 5 to 8: none has audio, one has only text.
    yield "absent", 7, case(
        data={"modalities": [modality("image"), modality("text", local=0.1, experts=4.0, **{"global": 0.2}),
                             modality("audio", local=0.1, experts=4.0, **{"global": 0.2})]},
        model={"moe": {"noise": 0.5, "choose": 2, "group_samples": 1}}, optimizer={"batch": 4})
    yield "towers", 8, case(
        data={"modalities": [modality("image"), modality("text", connector="mlp", hidden=9, positions="none"),
                             modality("audio", positions="rope")]},
        model={"trunks": "per_modality", "activation": "gelu", "kv_heads": 2,
               "moe": {"layers": "second half", "choose": 2}})
    yield "partition", 9, case(
        data={"modalities": [modality("image", local=0.1, experts=6.0, **{"global": 0.4}),
                             modality("text", local=0.2), modality("audio", experts=3.5, **{"global": 0.3})]},
        model={"moe": {"partition": "modality", "experts": 12, "choose": 2, "noise": 1.0,
                       "dispatch": "capacity", "capacity": "1.5"}})
    yield "dense", 6, case(model={"dense": True, "moe": {"choose": 2, "group_samples": 5}},
                           optimizer={"batch": 20, "warmup": 0.0})


def connector_base():
    """As base(), for a connector between latent spaces."""
    config = base()
    for m in config["data"]["modalities"]:
        m["positions"] = "none"
    merged(config, {
        "model": {"kind": "connector", "layers": 1, "heads": 0, "activation": "gelu", "dense": False,
                  "moe": {"layers": "all", "choose": 2, "bias": True, "dropout": 0.0}},
        "objective": {"importance": 0.0, "load": 0.0, "z": 0.0, "temperature": 0.2, "alpha": 0.3,
                      "regression": "squared", "directions": ["image:text", "text:audio", "audio:image"]},
        "schedule": {"alternate": "none"}})
    del config["objective"]["pairs"], config["objective"]["scale"], config["objective"]["largest_scale"]
    return config


def connector_cases():
    def case(**changes):
        return merged(connector_base(), changes)

    yield "joint", 11, case()
    yield "alternating", 12, case(
        model={"moe": {"dropout": 0.25, "choose": 3}}, schedule={"alternate": "cyclic"},
        objective={"regression": "smooth_l1", "alpha": 0.7}, optimizer={"clip": 1.5, "warmup": 2.0})
    yield "connector", 13, case(
        # Two choices: after one alone the norm removes the gate, and with it all but rounding of its gradient.
        model={"activation": "swiglu"},
        data={"modalities": [modality("image", positions="none", normalize="rms"),
                             modality("text", positions="none"), modality("audio", positions="none")]},
        objective={"directions": ["audio:text", "text:audio"]}, optimizer={"batch": 4, "clip": 0.7})
    yield "mlp", 14, case(model={"dense": True})


def connector_shapes(config):
    model, moe = config["model"], config["model"]["moe"]
    H, Z, gated = model["width"], model["embedding"] or model["width"], 1 + (model["activation"] == "swiglu")
    width = {m[0]: m[1] for m in MODALITIES}
    out = {}

    def linear(name, rows, columns):
        out[name + ".weight"], out[name + ".bias"] = (rows, columns), (rows,)

    for text in config["objective"]["directions"]:
        a, b = text.split(":")
        linear("adapter." + a, H, width[a])
        linear("prediction." + b, width[b], H)
        linear("key." + b, Z, width[b])
        linear("query.%s-%s" % (a, b), Z, H)
        out["direction.%s-%s" % (a, b)] = (width[a],)
    for view in reference_connector.VIEWS:
        out["blocks.0.view." + view] = (H,)
        out["blocks.0.norm.%s.weight" % view] = out["blocks.0.norm.%s.bias" % view] = (H,)
    if model["dense"]:
        linear("blocks.0.feed_forward.in", moe["choose"] * moe["hidden"] * gated, H)
        linear("blocks.0.feed_forward.out", H, moe["choose"] * moe["hidden"])
        return out
    linear("blocks.0.router", moe["experts"], H)
    for e in range(moe["experts"]):
        linear("blocks.0.experts.%d.in" % e, moe["hidden"] * gated, H)
        linear("blocks.0.experts.%d.out" % e, H, moe["hidden"])
    return out


def shapes(config):
    """Parameters by name."""
    if config["model"].get("kind") == "connector":
        return connector_shapes(config)
    model, moe = config["model"], config["model"]["moe"]
    C = model["width"]
    out = {"final_norm.weight": (C,), "log_scale": (1,)}
    for settings, (name, D, *_) in zip(config["data"]["modalities"], MODALITIES):
        connector = "connector.%s." % name
        width = C
        if settings["connector"] == "mlp":
            width = settings["hidden"] or C
            out[connector + "second.weight"], out[connector + "second.bias"] = (C, width), (C,)
        out[connector + "first.weight"], out[connector + "first.bias"] = (width, D), (width,)
        if settings["positions"] == "learned":
            out[connector + "position"] = (settings["length"], C)
        out["head.%s.weight" % name] = (model["embedding"] or C, C)
    if model.get("trunks") == "per_modality":
        del out["final_norm.weight"]
        for name, *_ in MODALITIES:
            out["trunk.%s.final_norm.weight" % name] = (C,)
            add_blocks(config, out, "trunk.%s." % name)
    else:
        add_blocks(config, out, "")
    return out


def add_blocks(config, out, trunk):
    model, moe = config["model"], config["model"]["moe"]
    C, H = model["width"], model["heads"]
    G, A = model["kv_heads"] or H, model["head_width"] or C // H
    gated = 2 if model["activation"] == "swiglu" else 1
    for layer in range(model["layers"]):
        block = "%sblocks.%d." % (trunk, layer)
        out[block + "attention_norm.weight"] = out[block + "forward_norm.weight"] = (C,)
        out[block + "attention.qkv.weight"] = ((H + 2 * G) * A, C)
        out[block + "attention.out.weight"] = (C, H * A)
        mixture = reference.is_moe(moe["layers"], model["layers"], layer)
        if mixture and not model["dense"] and not trunk:
            out[block + "router.weight"] = (moe["experts"], C)
            for e in range(moe["experts"]):
                out[block + "experts.%d.in.weight" % e] = (moe["hidden"] * gated, C)
                out[block + "experts.%d.out.weight" % e] = (C, moe["hidden"])
        else:  # a dense baseline computes as much per token as the mixture that it stands for
            F = moe["choose"] * moe["hidden"] if mixture else model["hidden"]
            out[block + "feed_forward.in.weight"] = (F * gated, C)
            out[block + "feed_forward.out.weight"] = (C, F)


def initial(config, draw):
    """Nothing at a special value: norms off one, biases off zero, routers that prefer."""
    P = {}
    for name, shape in shapes(config).items():
        deviation = 0.3 if len(shape) == 1 else 0.4 if "router" in name else 1 / math.sqrt(shape[-1])
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        values = centre + deviation * draw.normal(size=shape)
        if name == "log_scale":
            values[:] = math.log(10)
        P[name] = torch.from_numpy(values.astype(np.float32).astype(np.float64)).requires_grad_()
    return P


# --- what PyTorch makes of them -----------------------------------------------------------------------

def check_good(name, tower, parts):
    """Integers must not hang on the last bits: no near-ties; and a case must have what it is there for."""
    if tower.gaps["logit"] < 5e-5 or tower.gaps["priority"] < 2e-5:
        return "near-ties %s" % tower.gaps
    counts, E = parts["counts"], tower.moe["experts"]
    if tower.moe["dispatch"] == "capacity" and counts[..., :E].sum() - counts[..., E:2 * E].sum() < 10:
        return "hardly any drops"
    if name == "entropy":
        values = parts["values"].detach()
        p = values[..., 3:3 + E] / values[..., :1]
        H = -(p * p.log()).sum(-1)
        soft = torch.tensor([m["experts"] for m in tower.modalities])
        active = soft.log() > H
        if not (active[:, 0].all() and active[:, 1].any() and not active[:, 2].any()):
            return "the hinge of the global loss: %s" % active.tolist()
    return None


def number(x):
    return float(x.detach()) if torch.is_tensor(x) else float(x)


def embeddings(config, P, batch):
    """[M, B, Z] without noise and drops."""
    config = copy.deepcopy(config)
    config["model"]["moe"].update(noise=0.0, dispatch="dropless")
    tower = reference.Tower(config, P, batch, step=0)
    nothing = np.zeros(config["model"]["embedding"] or config["model"]["width"])
    return np.array([[tower.z[m][i].detach().numpy() if i in tower.z[m] else nothing
                      for i in range(len(batch.samples))] for m in range(batch.M)])


def connector_embeddings(config, P, batch):
    connector = reference_connector.Connector(config, P, batch, 0, 0, training=False)
    Z = config["model"]["embedding"] or config["model"]["width"]
    out = np.zeros((batch.M, len(batch.samples), Z))
    for m, vectors in ((connector.a, connector.query), (connector.b, connector.key)):
        for i, v in vectors.items():
            out[m, i] = v.detach().numpy()
    return out


def run_connector(name, seed, config, ids, latents):
    batch = make_batch(config, CONSUMED.get(name, 0), ids, latents)
    P = initial(config, np.random.default_rng(seed))
    before = {n: p.detach().clone() for n, p in P.items()}
    optimizer = reference_connector.Optimizer(config, P)
    result = {"value": before, "embedding": connector_embeddings(config, P, batch)}
    for step, updates in enumerate(("update", "update_two")):
        gap, parts = reference_connector.evaluate(config, P, batch, step)
        if gap < 5e-5:
            return None, "near-ties %g" % gap
        gradient = differentiate(P, parts["loss"])
        parts["norm"], parts["clip"], parts["rate"] = optimizer.step()
        result[updates] = {n: p.detach() - before[n] for n, p in P.items()}
        if step == 0:
            result.update(parts=parts, gradient=gradient, gaps={"logit": gap})
    result["parts"]["loss_after"] = parts["loss"]
    return result, None


def differentiate(P, loss):
    """Fresh gradients of every parameter; zeros where nothing depends on it."""
    for p in P.values():
        p.grad = torch.zeros_like(p)
    loss.backward()
    return {n: p.grad.clone() for n, p in P.items()}


def run_case(name, seed, config, ids, latents):
    batch = make_batch(config, CONSUMED.get(name, 0), ids, latents)
    P = initial(config, np.random.default_rng(seed))
    before = {n: p.detach().clone() for n, p in P.items()}
    optimizer = reference.Optimizer(config, P)
    result = {"value": before, "embedding": embeddings(config, P, batch)}
    for step, updates in enumerate(("update", "update_two")):
        tower, parts = reference.evaluate(config, P, batch, step)
        trouble = check_good(name, tower, parts)
        if trouble:
            return None, trouble
        gradient = differentiate(P, parts["loss"])
        parts["norm"], parts["clip"], parts["rate"] = optimizer.step()
        result[updates] = {n: p.detach() - before[n] for n, p in P.items()}
        if step == 0:
            result.update(parts=parts, gradient=gradient, gaps=tower.gaps)
    result["parts"]["loss_after"] = parts["loss"]
    return result, None


def flat(tensors, dtype):
    return np.concatenate([t.numpy().ravel() for t in tensors.values()]).astype(dtype)


def write_case(file, name, config, result):
    group, parts = file.create_group(name), result["parts"]
    options = {"compression": "gzip", "shuffle": True}
    group.attrs["config"] = np.bytes_(json.dumps(config))
    group.attrs["consumed"] = np.int64(CONSUMED.get(name, 0))
    group.attrs["scalars"] = np.array([number(parts[k]) for k in SCALARS])
    names = b"".join(n.encode().ljust(ENTRY, b"\0") for n in result["value"])
    group.create_dataset("names", data=np.frombuffer(names, np.uint8).reshape(-1, ENTRY), **options)
    group["sizes"] = np.array([t.numel() for t in result["value"].values()], np.int64)
    group.create_dataset("value", data=flat(result["value"], np.float32), **options)
    for key in ("gradient", "update", "update_two"):
        group.create_dataset(key, data=flat(result[key], np.float64), **options)
    group.create_dataset("embedding", data=result["embedding"], **options)
    group["pair"] = np.array([number(x) for x in parts["pair"]])
    group["sums"] = parts["values"].detach().numpy() if parts["values"] is not None else np.zeros((0,))
    group["counts"] = parts["counts"].numpy() if parts["counts"] is not None else np.zeros((0,), np.int64)


def describe(name, result):
    parts = result["parts"]
    text = " ".join("%s %.6g" % (k, number(parts[k])) for k in SCALARS)
    print("%-9s %d parameters, gaps %s\n  %s" % (name, sum(t.numel() for t in result["value"].values()),
                                                 result["gaps"], text))
    if parts["counts"] is not None:
        print("  counts", parts["counts"].tolist())


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)
    ids, latents = make_latents(os.path.join(folder, "train"))
    with h5py.File(os.path.join(folder, "golden.h5"), "w") as file:
        for name, seed, config in [*cases(), *connector_cases()]:
            result = None
            run = run_connector if config["model"].get("kind") == "connector" else run_case
            while result is None:  # the first seed without near-ties
                result, trouble = run(name, seed, copy.deepcopy(config), ids, latents)
                if trouble:
                    print("%s, seed %d: %s" % (name, seed, trouble))
                    seed += 100
            write_case(file, name, config, result)
            describe(name, result)


if __name__ == "__main__":
    main()
