#!/usr/bin/env python3
"""The model of `antiphon bench step`, written in PyTorch, and its time for a training step.

Same mathematics and sizes: two modalities of 8 and 12 latents a sample, linear connectors with learned positions,
pre-norm blocks (RMSNorm, attention inside each item, SwiGLU), every second one a mixture of experts without dropping,
with noise and the importance, load and z losses, mean pooling, a head per modality, the contrastive loss over the
batch, clipping by the global norm, AdamW. What is done for PyTorch's speed:

  * items of a modality have one length, so that attention runs in whole batches (scaled_dot_product_attention);
  * tokens are sorted by expert and go through torch._grouped_mm where it exists (bfloat16 on a GPU of compute
    capability 9), otherwise through one matrix product per expert;
  * torch.compile on the whole loss (--no-compile: eager), the fused AdamW;
  * bfloat16 by autocast over float32 parameters with its cache of cast weights, or with --pure by parameters that
    are bfloat16 themselves and an optimizer without float32 masters: less work than is compared with.

Prints one JSON line: seconds of a step (shortest and median), tokens/s, the settings and versions.
"""

import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

LENGTHS = {"image": 8, "text": 12}


def normal(*shape, deviation):
    return nn.Parameter(torch.randn(*shape) * deviation)


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    """x: [items, length, width] of one modality."""

    def __init__(self, width, heads, layers):
        super().__init__()
        self.heads = heads
        self.qkv = normal(3 * width, width, deviation=width**-0.5)
        self.out = normal(width, width, deviation=(width * 2 * layers) ** -0.5)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = F.linear(x, self.qkv).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return F.linear(mixed.transpose(1, 2).reshape(n, t, c), self.out)


class Dense(nn.Module):
    def __init__(self, width, hidden, layers):
        super().__init__()
        self.first = normal(2 * hidden, width, deviation=width**-0.5)
        self.second = normal(width, hidden, deviation=(hidden * 2 * layers) ** -0.5)

    def forward(self, x):
        gate, up = F.linear(x, self.first).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.second), 0.0


def grouped_works(x):
    return (
        hasattr(torch, "_grouped_mm")
        and x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device)[0] >= 9
    )


class Mixture(nn.Module):
    def __init__(self, width, hidden, layers, experts, choose, loop):
        super().__init__()
        self.experts, self.choose, self.loop = experts, choose, loop
        self.router = normal(experts, width, deviation=0.02)
        self.first = normal(experts, 2 * hidden, width, deviation=width**-0.5)
        self.second = normal(experts, width, hidden, deviation=(hidden * 2 * layers) ** -0.5)

    def products(self, rows, weight, count):
        """rows [R, k] sorted by expert, weight [E, n, k]."""
        if not self.loop and grouped_works(rows):
            ends = count.cumsum(0).to(torch.int32)
            return torch._grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=ends)
        parts = rows.split(count.tolist())
        return torch.cat([F.linear(part, weight[e]) for e, part in enumerate(parts)])

    def losses(self, logits, noisy, chosen, probability):
        sigma = 1.0 / self.experts
        importance = probability.sum(0)
        threshold = noisy.gather(1, chosen[:, -1:])
        load = (0.5 * torch.erfc((threshold - logits) / (sigma * math.sqrt(2)))).sum(0)
        z = torch.logsumexp(logits, -1).square().mean()
        variation = [s.var(correction=0) / s.mean().square() for s in (importance, load)]
        return 0.005 * variation[0] + 0.005 * variation[1] + 0.001 * z

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router.float())
            noisy = logits + torch.randn_like(logits) / self.experts
            probability = logits.softmax(-1)
            value, chosen = noisy.softmax(-1).topk(self.choose, dim=-1)
            extra = self.losses(logits, noisy, chosen, probability)
        expert, order = chosen.flatten().sort(stable=True)
        count = torch.bincount(expert, minlength=self.experts)
        rows = x[order // self.choose]
        gate, up = self.products(rows, self.first, count).chunk(2, dim=-1)
        out = self.products(F.silu(gate) * up, self.second, count)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        back = out[inverse].view(len(x), self.choose, -1)
        return (back * value.unsqueeze(-1).to(back.dtype)).sum(1), extra


class Block(nn.Module):
    def __init__(self, options, layer):
        super().__init__()
        width, hidden = options.width, options.hidden
        self.norms = nn.ModuleList([Norm(width), Norm(width)])
        self.attention = Attention(width, options.heads, options.layers)
        if layer % 2 == 0:
            self.forward_part = Mixture(
                width, hidden, options.layers, options.experts, options.choose, options.loop
            )
        else:
            self.forward_part = Dense(width, hidden, options.layers)

    def forward(self, streams):
        streams = {m: x + self.attention(self.norms[0](x)) for m, x in streams.items()}
        flat = torch.cat([x.flatten(0, 1) for x in streams.values()])
        y, extra = self.forward_part(self.norms[1](flat))
        y = flat + y
        out, at = {}, 0
        for m, x in streams.items():
            rows = x.shape[0] * x.shape[1]
            out[m] = y[at : at + rows].view(x.shape)
            at += rows
        return out, extra


class Tower(nn.Module):
    def __init__(self, options):
        super().__init__()
        width = options.width
        self.connector = nn.ModuleDict({m: nn.Linear(width, width) for m in LENGTHS})
        self.position = nn.ParameterDict({m: normal(t, width, deviation=0.02) for m, t in LENGTHS.items()})
        self.blocks = nn.ModuleList(Block(options, layer) for layer in range(options.layers))
        self.norm = Norm(width)
        self.head = nn.ParameterDict({m: normal(width, width, deviation=width**-0.5) for m in LENGTHS})
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, latents):
        streams = {m: self.connector[m](x) + self.position[m].to(x.dtype) for m, x in latents.items()}
        extra = 0.0
        for block in self.blocks:
            streams, more = block(streams)
            extra = extra + more
        z = {m: F.linear(self.norm(x).mean(1), self.head[m]) for m, x in streams.items()}
        with torch.autocast(next(iter(z.values())).device.type, enabled=False):
            a, b = (F.normalize(v.float(), dim=-1) for v in z.values())
            logits = self.log_scale.float().exp() * a @ b.T
            target = torch.arange(len(a), device=a.device)
            pair = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        return pair + extra


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 256), ("layers", 4), ("heads", 4), ("experts", 8), ("choose", 1), ("batch", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pure", action="store_true", help="bfloat16 parameters, no float32 masters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--loop", action="store_true", help="one product per expert even where a grouped one exists")
    options = parser.parse_args()
    options.hidden = (options.width * 8 // 3 + 31) // 32 * 32
    return options


def make_step(options):
    torch.manual_seed(1)
    device = torch.device(options.device)
    half = options.precision == "bfloat16"
    model = Tower(options).to(device)
    if half and options.pure:
        model = model.to(torch.bfloat16)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    dtype = torch.bfloat16 if half else torch.float32
    latents = {m: torch.randn(options.batch, t, options.width, device=device, dtype=dtype) for m, t in LENGTHS.items()}
    loss_of = model if options.no_compile else torch.compile(model)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half and not options.pure):
            loss = loss_of(latents)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = options.device.startswith("cuda")
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    step = make_step(options)
    seconds = []
    for i in range(options.warm_up + options.steps):
        wait()
        start = time.perf_counter()
        loss = step()
        wait()
        if i >= options.warm_up:
            seconds.append(time.perf_counter() - start)
    tokens = options.batch * sum(LENGTHS.values())
    print(
        json.dumps(
            {
                "bench": "torch step",
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                "threads": torch.get_num_threads(),
                "compiled": not options.no_compile,
                "grouped": not options.loop,
                **{k: getattr(options, k) for k in ("precision", "pure", "width", "layers", "experts", "choose")},
                "tokens": tokens,
                "step_seconds": min(seconds),
                "median_seconds": statistics.median(seconds),
                "tokens_per_second": tokens / min(seconds),
                "loss": loss.item(),
            }
        )
    )


if __name__ == "__main__":
    main()
