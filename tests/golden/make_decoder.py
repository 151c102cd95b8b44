#!/usr/bin/env python3
"""Makes the golden data of a decoder for test_golden, as make_golden.py does for towers: see reference_decoder.py.

    python make_decoder.py [folder]

needs numpy, torch (CPU), h5py and transformers (5.x), against which the dense reference is checked on the way.

    decoder/train/<modality>-<NNNNN>.h5    the latents of make_golden.py; the first modality's carry tokens
    decoder.h5                             groups as in golden.h5, but
      pair       float64 [1]               the next-token loss
      embedding  float64 [1, B, 8]         the loss of each token of each response, of an evaluation; zeros behind
"""

import copy
import json
import os
import sys

import h5py
import numpy as np
import torch
import transformers

import make_golden as golden
import reference
import reference_decoder

VOCABULARY, MOST = 30, 8
CONSUMED = {"tied": 5, "noisy": 11}


def make_tokens():
    """Prompts with marks in the middle, at the end, none; empty ones; sample 5 begins with its response."""
    draw = np.random.default_rng(20240511)
    prompts, targets = [], []
    for i in range(golden.SAMPLES):
        prompt = draw.integers(0, VOCABULARY, size=int(draw.integers(0, 5))).tolist()
        if i % 3 == 0:
            prompt.insert(len(prompt) // 2, -1 - i % 2)
        if i % 5 == 1:
            prompt.append(-3)
        prompts.append([] if i in (5, 7) else prompt)
        targets.append(draw.integers(0, VOCABULARY, size=1 + int(draw.integers(0, MOST))).tolist())
    return prompts, targets


def add_tokens(folder, prompts, targets):
    for shard in range(golden.SAMPLES // golden.SHARD):
        part = slice(shard * golden.SHARD, (shard + 1) * golden.SHARD)
        with h5py.File(os.path.join(folder, "image-%05d.h5" % shard), "a") as file:
            for kind, lists in (("prompt", prompts[part]), ("target", targets[part])):
                file[kind + "_token"] = np.array(sum(lists, []), np.int32)
                file[kind + "_offset"] = np.cumsum([0] + [len(x) for x in lists]).astype(np.uint64)


def base():
    config = golden.base()
    golden.merged(config, {
        "model": {"kind": "decoder", "vocabulary": VOCABULARY, "tied": False, "qkv_bias": False, "layers": 3,
                  "kv_heads": 2, "head_width": 6, "embedding": 0,
                  "rope_scaling": {"kind": "none", "factor": 1.0, "low": 1.0, "high": 4.0, "length": 8192},
                  "moe": {"choose": 2, "gate": "renormalised"}},
        "data": {"modalities": [golden.modality(m[0], positions="none") for m in golden.MODALITIES]},
        "optimizer": {"clip": 2.0}})
    del config["objective"]["pairs"], config["objective"]["scale"], config["objective"]["largest_scale"]
    return config


def cases():
    def case(**changes):
        return golden.merged(base(), changes)

    none = {"importance": 0.0, "load": 0.0, "z": 0.0}
    yield "spliced", 21, case(
        data={"modalities": [golden.modality("image", positions="none", local=0.1, experts=4.0, **{"global": 0.2}),
                             golden.modality("text", positions="none"),
                             golden.modality("audio", positions="none", normalize="rms")]})
    yield "tied", 22, case(
        model={"tied": True, "qkv_bias": True, "moe": {"layers": "none"},
               "rope_scaling": {"kind": "llama3", "factor": 8.0, "length": 40}},
        objective=none, optimizer={"batch": 4})
    yield "noisy", 23, case(
        data={"modalities": [golden.modality("image", positions="none"),
                             golden.modality("text", connector="mlp", hidden=9),
                             golden.modality("audio", positions="none")]},
        model={"kv_heads": 4, "activation": "gelu", "rope_scaling": {"kind": "linear", "factor": 4.0},
               "moe": {"choose": 1, "noise": 1.0, "gate": "softmax"}}, optimizer={"batch": 8, "clip": 1000.0})
    yield "plain", 24, case(model={"moe": {"layers": "none"}, "kv_heads": 0}, objective=none)


def shapes(config):
    model = config["model"]
    out = {n: s for n, s in golden.shapes({**config, "model": {**model, "kind": "tower"}}).items()
           if not n.startswith("head.") and n != "log_scale"}
    H, G, A = model["heads"], model["kv_heads"] or model["heads"], model["head_width"]
    for layer in range(model["layers"] if model["qkv_bias"] else 0):
        out["blocks.%d.attention.qkv.bias" % layer] = ((H + 2 * G) * A,)
    out["embedding.weight"] = (VOCABULARY, model["width"])
    if not model["tied"]:
        out["output.weight"] = (VOCABULARY, model["width"])
    return out


def initial(config, draw):
    P = {}
    for name, shape in shapes(config).items():
        deviation = 0.3 if len(shape) == 1 else 0.4 if "router" in name else 1 / np.sqrt(shape[-1])
        if name == "embedding.weight":
            deviation = 0.7
        values = (1.0 if name.endswith("norm.weight") else 0.0) + deviation * draw.normal(size=shape)
        P[name] = torch.from_numpy(values.astype(np.float32).astype(np.float64)).requires_grad_()
    return P


def make_batch(config, consumed, ids, latents, prompts, targets):
    ready = []
    for m, settings in enumerate(config["data"]["modalities"]):
        shift, scale = reference.standardisation(np.concatenate(latents[m]), settings["normalize"])
        ready.append([torch.from_numpy((x - shift) * scale) for x in latents[m]])
    order = [(consumed + i) % golden.SAMPLES for i in range(config["optimizer"]["batch"])]
    return reference_decoder.Batch([(ids[i], -1, [x[i] for x in ready], prompts[i], targets[i]) for i in order],
                                   len(ready))


# --- the same decoder in transformers ---------------------------------------------------------------------

def rope_of(model):
    s = model["rope_scaling"]
    rope = {"rope_type": {"none": "default"}.get(s["kind"], s["kind"]), "rope_theta": model["rope_base"]}
    if s["kind"] != "none":
        rope["factor"] = s["factor"]
    if s["kind"] == "llama3":
        rope.update(low_freq_factor=s["low"], high_freq_factor=s["high"],
                    original_max_position_embeddings=s["length"])
    return rope


def check_with_transformers(config, P, batch):
    """Logits of every row of a dense decoder, from the same embedded rows."""
    model = config["model"]
    H, G, A = model["heads"], model["kv_heads"] or model["heads"], model["head_width"]
    kind = "Qwen2" if model["qkv_bias"] else "Llama"
    settings = getattr(transformers, kind + "Config")(
        vocab_size=VOCABULARY, hidden_size=model["width"], intermediate_size=model["hidden"],
        num_hidden_layers=model["layers"], num_attention_heads=H, num_key_value_heads=G, head_dim=A,
        rms_norm_eps=model["norm_epsilon"], rope_parameters=rope_of(model), max_position_embeddings=8192,
        tie_word_embeddings=False, attn_implementation="eager")
    with torch.device("cpu"):
        peer = getattr(transformers, kind + "ForCausalLM")(settings).double().eval()
    state = {"model.embed_tokens.weight": P["embedding.weight"], "model.norm.weight": P["final_norm.weight"],
             "lm_head.weight": P["embedding.weight" if model["tied"] else "output.weight"]}
    for layer in range(model["layers"]):
        own, name = "blocks.%d." % layer, "model.layers.%d." % layer
        for part in ("weight", "bias")[:1 + model["qkv_bias"]]:
            q, k, v = P[own + "attention.qkv." + part].split([H * A, G * A, G * A])
            for which, x in zip("qkv", (q, k, v)):
                state[name + "self_attn.%s_proj.%s" % (which, part)] = x
        gate, up = P[own + "feed_forward.in.weight"].chunk(2)
        state.update({name + "self_attn.o_proj.weight": P[own + "attention.out.weight"],
                      name + "input_layernorm.weight": P[own + "attention_norm.weight"],
                      name + "post_attention_layernorm.weight": P[own + "forward_norm.weight"],
                      name + "mlp.gate_proj.weight": gate, name + "mlp.up_proj.weight": up,
                      name + "mlp.down_proj.weight": P[own + "feed_forward.out.weight"]})
    peer.load_state_dict({n: x.detach() for n, x in state.items()}, strict=True)
    decoder, worst = reference_decoder.Decoder(config, P, batch, 0), 0.0
    with torch.no_grad():
        for _, _, first, n in batch.items:
            logits = peer(inputs_embeds=decoder.embedded[None, first:first + n]).logits[0]
            worst = max(worst, (logits - decoder.logits[first:first + n]).abs().max().item())
    print("  largest difference of a logit from transformers' %s: %.2g" % (kind, worst))
    assert worst < 1e-5, worst  # transformers computes angles and norms in float32


def token_losses(config, P, batch):
    config = copy.deepcopy(config)
    config["model"]["moe"]["noise"] = 0.0
    decoder = reference_decoder.Decoder(config, P, batch, 0)
    out = np.zeros((1, len(batch.samples), MOST))
    for (i, j, _, _), loss in zip(batch.predictions, decoder.losses):
        out[0, i, j] = loss.item()
    return out


def run_case(name, seed, config, *data):
    batch = make_batch(config, CONSUMED.get(name, 0), *data)
    P = initial(config, np.random.default_rng(seed))
    before = {n: p.detach().clone() for n, p in P.items()}
    optimizer = reference.Optimizer(config, P)
    result = {"value": before, "embedding": token_losses(config, P, batch)}
    for step, updates in enumerate(("update", "update_two")):
        decoder, parts = reference_decoder.evaluate(config, P, batch, step)
        if decoder.gaps["logit"] < 5e-5:
            return None, "near-ties %s" % decoder.gaps
        if step == 0 and config["model"]["moe"]["layers"] == "none":
            check_with_transformers(config, P, batch)
        gradient = golden.differentiate(P, parts["loss"])
        parts["norm"], parts["clip"], parts["rate"] = optimizer.step()
        result[updates] = {n: p.detach() - before[n] for n, p in P.items()}
        if step == 0:
            result.update(parts=parts, gradient=gradient, gaps=decoder.gaps)
    result["parts"]["loss_after"] = parts["loss"]
    return result, None


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)
    golden.CONSUMED.update(CONSUMED)
    golden.ABSENT["text"] += (5,)
    shards = os.path.join(folder, "decoder", "train")
    ids, latents = golden.make_latents(shards)
    prompts, targets = make_tokens()
    assert all(len(x[5]) == 0 for x in latents) and not prompts[5]
    add_tokens(shards, prompts, targets)
    with h5py.File(os.path.join(folder, "decoder.h5"), "w") as file:
        for name, seed, config in cases():
            result = None
            while result is None:
                result, trouble = run_case(name, seed, copy.deepcopy(config), ids, latents, prompts, targets)
                if trouble:
                    print("%s, seed %d: %s" % (name, seed, trouble))
                    seed += 100
            golden.write_case(file, name, config, result)
            golden.describe(name, result)


if __name__ == "__main__":
    main()
