"""A second, independent implementation of the connector between latent spaces (Alt-MoE), its objective and its
alternating optimizer step: PyTorch, float64, one item at a time, written from the mathematics and for clarity.

    z = GELU(W_a (h + u) + c_a);  for each view:  s = z + t;  y = mixture(s);  o = s + GELU(LN(y))
    predicted = V_b mean(o_prediction), query = C_ab mean(o_contrast), key = K_b mean(h_b)
    L = alpha regression + (1 - alpha) InfoNCE(cos(query, key) / temperature), both ways, halves
"""

import math

import numpy as np
import torch

import reference

VIEWS = ("prediction", "contrast")
DROPOUT_PURPOSE = 4


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred ** 2).mean(-1, keepdim=True) + 1e-5) * weight + bias


def normalised(v):
    return v / torch.clamp(v.norm(), min=1e-12)


class Connector:
    """The outputs of one direction for one batch: self.predicted, query, key, target by sample."""

    def __init__(self, config, P, batch, step, direction, training=True):
        self.config, self.model, self.moe = config, config["model"], config["model"]["moe"]
        self.P, self.batch, self.step, self.training = P, batch, step, training
        self.names = [m["name"] for m in config["data"]["modalities"]]
        self.gap = math.inf
        self.a, self.b = (self.names.index(n) for n in config["objective"]["directions"][direction].split(":"))
        self.predicted, self.query, self.key, self.target = {}, {}, {}, {}
        for i, (_, _, latents) in enumerate(batch.samples):
            if len(latents[self.a]):
                self.ask(i, latents[self.a])
            if len(latents[self.b]):
                mean = latents[self.b].mean(0)
                self.target[i] = mean
                self.key[i] = normalised(self.linear("key.%s" % self.names[self.b], mean))

    def linear(self, name, x):
        return x @ self.P[name + ".weight"].T + self.P[name + ".bias"]

    def ask(self, i, latents):
        a, b = self.names[self.a], self.names[self.b]
        z = torch.nn.functional.gelu(self.linear("adapter." + a, latents + self.P["direction.%s-%s" % (a, b)]))
        means = []
        for v, view in enumerate(VIEWS):
            s = z + self.P["blocks.0.view." + view]
            norm = "blocks.0.norm.%s" % view
            y = layer_norm(self.block(i, v, s), self.P[norm + ".weight"], self.P[norm + ".bias"])
            means.append((s + torch.nn.functional.gelu(y)).mean(0))
        self.predicted[i] = self.linear("prediction." + b, means[0])
        self.query[i] = normalised(self.linear("query.%s-%s" % (a, b), means[1]))

    def feed_forward(self, name, x):
        hidden = self.linear(name + ".in", x)
        return self.linear(name + ".out", reference.activate(self.model["activation"], hidden))

    def block(self, i, view, s):
        if self.model["dense"]:
            return self.feed_forward("blocks.0.feed_forward", s)
        E, K = self.moe["experts"], self.moe["choose"]
        logits = self.linear("blocks.0.router", s)
        order = torch.sort(-logits.detach(), dim=-1, stable=True)
        self.gap = min(self.gap, order.values.diff(dim=-1)[:, :K].min().item())
        gate = logits.softmax(-1)
        rows = []
        for t in range(len(s)):
            y = 0
            for k, e in enumerate(order.indices[t, :K].tolist()):
                out = self.feed_forward("blocks.0.experts.%d" % e, s[t])
                y = y + gate[t, e] * self.dropped(out, i, view, t, k)
            rows.append(y)
        return torch.stack(rows)

    def dropped(self, x, i, view, t, k):
        """Dropout by the place of the token: sample, modality, view, position, choice."""
        rate, C = self.moe["dropout"], len(x)
        if rate == 0 or not self.training:
            return x
        key = (i * len(self.names) + self.a) * 2 ** 24 + view * 2 ** 23 + t
        stream = reference.xxhash64_words([DROPOUT_PURPOSE, self.step, 0])
        first = (key * self.moe["choose"] + k) * -(-C // 4)
        words = reference.philox(self.config["run"]["seed"], stream, np.arange(first, first + -(-C // 4)))
        bits = np.stack(words, axis=1).ravel()[:C].astype(np.float64)
        return torch.where(torch.from_numpy(bits < rate * 2.0 ** 32), 0.0, x / (1 - rate))

    def losses(self):
        """regression, contrastive: means over the samples that have both modalities."""
        both = [i for i in range(len(self.batch.samples)) if i in self.query and i in self.key]
        zero = torch.zeros((), dtype=torch.float64)
        if not both:
            return zero, zero
        difference = [self.predicted[i] - self.target[i] for i in both]
        if self.config["objective"]["regression"] == "squared":
            rows = [(d ** 2).sum() for d in difference]
        else:
            rows = [torch.where(d.abs() < 1, d ** 2 / 2, d.abs() - 0.5).mean() for d in difference]
        ids, labels = self.batch.ids, self.batch.labels
        masked = torch.tensor([[i != j and (ids[i] == ids[j] or labels[i] == labels[j] >= 0) for j in both]
                               for i in both])
        s = torch.stack([self.query[i] for i in both]) @ torch.stack([self.key[i] for i in both]).T
        s = (s / self.config["objective"]["temperature"]).masked_fill(masked, -math.inf)
        contrastive = ((s.logsumexp(1) + s.logsumexp(0)) / 2 - s.diagonal()).mean()
        return torch.stack(rows).mean(), contrastive


def direction_of(config, step):
    """-1: all."""
    return -1 if config["schedule"]["alternate"] == "none" else step % len(config["objective"]["directions"])


def active(config, name, direction):
    """Whether a step of this direction changes the parameter."""
    directions = config["objective"]["directions"]
    for d, text in enumerate(directions):
        a, b = text.split(":")
        if direction in (-1, d) and name.startswith(
                ("blocks.", "adapter.%s." % a, "direction.%s-%s" % (a, b), "prediction.%s." % b,
                 "query.%s-%s." % (a, b), "key.%s." % b)):
            return True
    return False


class Optimizer:
    """AdamW on the active set, each direction's rate by its own steps."""

    def __init__(self, config, P):
        self.config, self.P, self.t = config, P, 0
        o = config["optimizer"]
        matrix = {n: p.ndim == 2 and "router" not in n for n, p in P.items()}
        groups = [{"params": [p for n, p in P.items() if matrix[n] == which],
                   "weight_decay": o["weight_decay"] if which else 0.0} for which in (True, False)]
        self.adamw = torch.optim.AdamW(groups, betas=(o["beta1"], o["beta2"]), eps=o["epsilon"])

    def step(self):
        """Returns norm, clipping factor, rate."""
        config, direction = self.config, direction_of(self.config, self.t)
        D, steps = len(config["objective"]["directions"]), config["run"]["steps"]
        for n, p in self.P.items():
            if not active(config, n, direction):
                p.grad = None
        norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in self.P.values() if p.grad is not None))
        most = config["optimizer"]["clip"] * (D if direction < 0 else 1)
        factor = most / norm if norm > most else 1.0
        for p in self.P.values():
            if p.grad is not None:
                p.grad *= factor
        own = self.t if direction < 0 else self.t // D
        total = steps if direction < 0 else sum(1 for t in range(steps) if t % D == direction)
        lr = reference.rate(config["optimizer"], own, total)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.t += 1
        return norm, factor, lr


def evaluate(config, P, batch, step):
    """The losses of one step, as a dictionary, and the smallest gap between logits."""
    alpha, directions = config["objective"]["alpha"], config["objective"]["directions"]
    zero = torch.zeros((), dtype=torch.float64)
    regressions, contrasts, gap = [zero] * len(directions), [zero] * len(directions), math.inf
    for d in range(len(directions)):
        if direction_of(config, step) in (-1, d):
            connector = Connector(config, P, batch, step, d)
            regressions[d], contrasts[d] = connector.losses()
            gap = min(gap, connector.gap)
    contrastive = (1 - alpha) * sum(contrasts)
    none = {k: zero for k in ("importance", "load", "z", "local", "global")}
    return gap, {"loss": alpha * sum(regressions) + contrastive, "contrastive": contrastive,
                 "scale": 1 / config["objective"]["temperature"], "pair": contrasts, "values": None, "counts": None,
                 **none}
