#!/usr/bin/env python3
"""Makes the small random LLaMA and Qwen2 of test_published: what transformers saves, and the logits that it computes
from it in float64.  Run again only when the cases change:

    python make_published.py [folder]

needs numpy, torch (CPU), h5py and transformers (5.x).

    published/<name>/config.json, model.safetensors or shards with an index
    published/train/image-00000.h5    sequences as prompt and response, no latents
    published/logits.h5               <name>: float64 [rows, V], all rows of all sequences
"""

import os
import shutil
import sys

import h5py
import numpy as np
import torch
import transformers

VOCABULARY, SEQUENCES = 61, 3


def base(**settings):
    return {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "attn_implementation": "eager", **settings}


# name, architecture, settings, dtype, largest shard
CASES = (
    ("llama", "Llama", base(rms_norm_eps=1e-5, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}), torch.float32, "50GB"),
    ("qwen", "Qwen2", base(tie_word_embeddings=True, head_dim=8, rope_parameters={
        "rope_type": "default", "rope_theta": 1000.0}), torch.bfloat16, "50GB"),
    ("shards", "Llama", base(num_key_value_heads=4, rope_parameters={
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}), torch.float16, "10KB"),
)


def make_sequences(folder):
    draw = np.random.default_rng(17)
    prompts = [draw.integers(0, VOCABULARY, size=n) for n in (5, 1, 40)]
    targets = [draw.integers(0, VOCABULARY, size=n) for n in (7, 3, 20)]
    os.makedirs(folder, exist_ok=True)
    with h5py.File(os.path.join(folder, "image-00000.h5"), "w") as file:
        for key, text in (("format", "antiphon-latents"), ("modality", "image"), ("encoder", "none"),
                          ("dtype", "float32")):
            file.attrs.create(key, text, dtype=h5py.string_dtype("utf-8"))
        file.attrs.create("version", 1, dtype=np.int32)
        file.attrs.create("width", 4, dtype=np.int32)
        file["id"] = np.arange(SEQUENCES, dtype=np.uint64)
        file["offset"] = np.zeros(SEQUENCES + 1, np.uint64)
        file.create_dataset("latent", shape=(0, 4), dtype=np.float32)
        for kind, lists in (("prompt", prompts), ("target", targets)):
            file[kind + "_token"] = np.concatenate(lists).astype(np.int32)
            file[kind + "_offset"] = np.cumsum([0] + [len(x) for x in lists]).astype(np.uint64)
    return [np.concatenate(pair) for pair in zip(prompts, targets)]


def make_model(folder, seed, kind, settings, dtype, largest):
    torch.manual_seed(seed)
    config = getattr(transformers, kind + "Config")(**settings)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():  # nothing at a special value; large enough that attention decides
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.25 if p.dim() == 2 else 0.3) + (1.0 if "norm" in name else 0.0))
    model = model.to(dtype)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=largest)
    for file in os.listdir(folder):
        if file.startswith("generation_config"):
            os.remove(os.path.join(folder, file))
    # read back: what was made in a narrow type has its frequencies rounded to it
    return getattr(transformers, kind + "ForCausalLM").from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager").eval()


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(os.path.abspath(__file__)), "published")
    torch.set_num_threads(1)
    sequences = make_sequences(os.path.join(folder, "train"))
    with h5py.File(os.path.join(folder, "logits.h5"), "w") as file:
        for seed, (name, *case) in enumerate(CASES):
            model = make_model(os.path.join(folder, name), seed, *case)
            with torch.no_grad():
                rows = [model(torch.from_numpy(s)[None]).logits[0].numpy() for s in sequences]
            file[name] = np.concatenate(rows)
            print(name, file[name].shape, float(np.abs(file[name]).max()), os.listdir(os.path.join(folder, name)))


if __name__ == "__main__":
    main()
