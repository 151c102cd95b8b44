"""A second, independent implementation of the tower, its losses and its optimizer step: PyTorch, float64,
written for clarity.  It follows the same written mathematics as the C program and shares no code with it.

    latents -> standardise -> connector (+ positions) -> blocks -> RMSNorm -> mean over the item -> head
            -> L2 norm

All tokens of a batch lie in one matrix, ordered by sample, modality, position.
"""

import math
import struct

import numpy as np
import torch

import reference_resampler

MASK64 = (1 << 64) - 1


# --- counter-based random numbers -----------------------------------------------------------------

def philox(seed, stream, index):
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words; stream may be an int, index an array."""
    index = np.asarray(index, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c = [index & low, index >> np.uint64(32), np.full_like(index, stream & 0xFFFFFFFF),
         np.full_like(index, stream >> 32)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]), b & low,
             (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def normal(seed, stream, index):
    """Standard normal numbers by Box-Muller from 53-bit uniforms in (0, 1)."""
    c = philox(seed, stream, index)
    unit = [(((c[i + 1] << np.uint64(32) | c[i]) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0 ** -53
            for i in (0, 2)]
    return np.sqrt(-2 * np.log(unit[0])) * np.cos(2 * math.pi * unit[1])


def xxhash64_words(words):
    """XXH64 with seed 0 of fewer than four 64-bit words."""
    p1, p2, p3, p4, p5 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                          0x27D4EB2F165667C5)

    def rotate(x, n):
        return ((x << n) | (x >> (64 - n))) & MASK64

    h = (p5 + 8 * len(words)) & MASK64
    for word in words:
        h ^= rotate(word * p2 & MASK64, 31) * p1 & MASK64
        h = (rotate(h, 27) * p1 + p4) & MASK64
    h = (h ^ h >> 33) * p2 & MASK64
    h = (h ^ h >> 29) * p3 & MASK64
    return h ^ h >> 32


ROUTER_PURPOSE = 3


# --- data -----------------------------------------------------------------------------------------

def standardisation(rows, how):
    """shift, scale per feature over all rows [T, D] of the split."""
    mean, deviation = rows.mean(0), rows.std(0)
    if how == "none":
        return np.zeros_like(mean), np.ones_like(mean)
    if how == "rms":
        return np.zeros_like(mean), np.full_like(mean, 1 / math.sqrt((rows ** 2).mean()))
    return mean, np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1), 1)


def rows_of(latents, m, queries):
    return queries[m] if queries and queries[m] and len(latents) > 0 else len(latents)


class Batch:
    """sample[i] = (id, label, [latents of each modality, [t, D]]), latents standardised.  queries[m]: rows that a
    resampler makes of an item, or 0."""

    def __init__(self, samples, modalities, queries=None):
        self.samples, self.M = samples, modalities
        self.ids = [s[0] for s in samples]
        self.labels = [s[1] for s in samples]
        self.items, self.sample, self.modality, self.position, self.key = [], [], [], [], []
        for i, (_, _, latents) in enumerate(samples):
            for m in range(modalities):
                n = rows_of(latents[m], m, queries)
                if n == 0:
                    continue
                self.items.append((i, m, len(self.sample), n))
                self.sample += [i] * n
                self.modality += [m] * n
                self.position += range(n)
                self.key += [(i * modalities + m) * 2 ** 24 + p for p in range(n)]
        self.modality = torch.tensor(self.modality)
        self.tokens = len(self.sample)


# --- the tower --------------------------------------------------------------------------------------

def activate(name, h):
    if name == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(h, approximate="tanh" if name == "gelu_tanh" else "none")


def rmsnorm(x, weight, epsilon):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def is_moe(rule, layers, layer):
    if rule in ("all", "none"):
        return rule == "all"
    if rule == "second half":
        return layer >= layers - layers // 2
    if rule.startswith("every "):
        return layer % int(rule[6:]) == 0
    return layer in [int(x) for x in rule.split(",")]


def thousandths(text):
    whole, _, part = text.partition(".")
    return int(whole) * 1000 + int((part + "000")[:3])


class Tower:
    """One forward pass; P: name -> tensor.  Leaves self.z[m][sample] and self.routers."""

    def __init__(self, config, P, batch, step):
        self.config, self.model, self.moe = config, config["model"], config["model"]["moe"]
        self.P, self.batch, self.step = P, batch, step
        self.modalities = config["data"]["modalities"]
        self.own_trunks = self.model.get("trunks") == "per_modality"
        self.routers = []
        self.gaps = {"logit": math.inf, "priority": math.inf}
        x = torch.cat([self.connect(i, m) for i, m, _, _ in batch.items])
        for layer in range(self.model["layers"]):
            x = x + self.attention(layer, self.norm(x, "blocks.%d.attention_norm" % layer))
            h = self.norm(x, "blocks.%d.forward_norm" % layer)
            dense = self.model["dense"] or self.own_trunks
            if is_moe(self.moe["layers"], self.model["layers"], layer) and not dense:
                x = x + self.mixture(layer, h)
            else:
                x = x + self.feed_forward("blocks.%d.feed_forward" % layer, h)
        x = self.norm(x, "final_norm")
        self.z = [{} for _ in self.modalities]
        for i, m, first, n in batch.items:
            z = P["head.%s.weight" % self.modalities[m]["name"]] @ x[first:first + n].mean(0)
            self.z[m][i] = z / torch.clamp(z.norm(), min=1e-12)

    def of_trunk(self, x, name, function):
        """function(rows, parameter) with the parameter of the trunk that the rows pass."""
        if not self.own_trunks:
            return function(x, self.P[name])
        out = None
        for m, settings in enumerate(self.modalities):
            rows = torch.nonzero(self.batch.modality == m)[:, 0]
            y = function(x[rows], self.P["trunk.%s.%s" % (settings["name"], name)])
            out = x.new_zeros(len(x), y.shape[1]) if out is None else out
            out = out.index_copy(0, rows, y)
        return out

    def linear(self, x, name):
        return self.of_trunk(x, name, lambda rows, weight: rows @ weight.T)

    def norm(self, x, name):
        return self.of_trunk(x, name + ".weight",
                             lambda rows, weight: rmsnorm(rows, weight, self.model["norm_epsilon"]))

    def connect(self, i, m):
        settings, P = self.modalities[m], self.P
        name = "connector.%s." % settings["name"]
        if settings["connector"] == "resampler":
            return reference_resampler.resample(self.batch.samples[i][2][m], settings, self.model, P, name)
        x = self.batch.samples[i][2][m] @ P[name + "first.weight"].T + P[name + "first.bias"]
        if settings["connector"] == "mlp":
            x = torch.nn.functional.gelu(x) @ P[name + "second.weight"].T + P[name + "second.bias"]
        if settings["positions"] == "learned":
            x = x + P[name + "position"][:len(x)]
        return x

    def rotate(self, x):
        """x [n, heads, A], positions 0 .. n - 1; pairs (i, i + A/2)."""
        n, _, A = x.shape
        frequency = self.model["rope_base"] ** (-torch.arange(A // 2, dtype=torch.float64) * 2 / A)
        angle = torch.arange(n, dtype=torch.float64)[:, None, None] * frequency
        a, b = x[..., :A // 2], x[..., A // 2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def attention(self, layer, x):
        H, G = self.model["heads"], self.model["kv_heads"] or self.model["heads"]
        A = self.model["head_width"] or self.model["width"] // H
        name = "blocks.%d.attention." % layer
        qkv = self.linear(x, name + "qkv.weight")
        out = []
        for _, m, first, n in self.batch.items:
            rows = qkv[first:first + n]
            q = rows[:, :H * A].view(n, H, A)
            k = rows[:, H * A:(H + G) * A].view(n, G, A)
            v = rows[:, (H + G) * A:].view(n, G, A)
            if self.modalities[m]["positions"] == "rope":
                q, k = self.rotate(q), self.rotate(k)
            k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
            score = torch.einsum("ihc,jhc->hij", q, k) / math.sqrt(A)
            out.append(torch.einsum("hij,jhc->ihc", score.softmax(-1), v).reshape(n, H * A))
        return self.linear(torch.cat(out), name + "out.weight")

    def feed_forward(self, name, x):
        return self.linear(activate(self.model["activation"], self.linear(x, name + ".in.weight")),
                           name + ".out.weight")

    # --- mixture of experts

    def noise(self, experts):
        """[T, E] deviations of this layer's router noise."""
        sigma = self.moe["noise"] / experts
        stream = xxhash64_words([ROUTER_PURPOSE, self.step, len(self.routers)])
        index = np.asarray(self.batch.key, dtype=np.uint64)[:, None] * np.uint64(experts) \
            + np.arange(experts, dtype=np.uint64)
        return sigma * torch.from_numpy(normal(self.config["run"]["seed"], stream, index))

    def mixture(self, layer, x):
        E, K = self.moe["experts"], self.moe["choose"]
        logits = x @ self.P["blocks.%d.router.weight" % layer].T
        if self.moe.get("partition") == "modality":  # an expert of another modality is impossible
            M = len(self.modalities)
            owner = torch.tensor([next(m for m in range(M) if e < (m + 1) * E // M) for e in range(E)])
            logits = logits.masked_fill(owner != self.batch.modality[:, None], -1e6)
        noisy = logits + self.noise(E) if self.moe["noise"] > 0 else logits
        prob, noisy_prob = logits.softmax(-1), noisy.softmax(-1)
        order = torch.sort(-noisy.detach(), dim=-1, stable=True)
        choice = order.indices[:, :K]
        gap = order.values.diff(dim=-1)[:, :K]
        self.gaps["logit"] = min(self.gaps["logit"], gap.min().item())
        if self.moe["gate"] == "renormalised":
            gate = noisy.gather(1, choice).softmax(-1)
        else:
            gate = noisy_prob.gather(1, choice)
        keep = self.keep(choice, noisy_prob.detach().max(-1).values)
        y = torch.zeros_like(x)
        for e in range(E):
            token, k = torch.nonzero((choice == e) & keep, as_tuple=True)
            out = self.feed_forward("blocks.%d.experts.%d" % (layer, e), x[token])
            y = y.index_add(0, token, gate[token, k, None] * out)
        self.routers.append({"logits": logits, "noisy": noisy, "prob": prob, "choice": choice,
                             "keep": keep})
        return y

    def keep(self, choice, priority):
        """Which choices find room [T, K]."""
        keep = torch.ones_like(choice, dtype=torch.bool)
        if self.moe["dispatch"] == "dropless":
            return keep
        E, K, size = self.moe["experts"], self.moe["choose"], self.moe["group_samples"]
        groups = {}
        for t, sample in enumerate(self.batch.sample):
            groups.setdefault(sample // size, []).append(t)
        for tokens in groups.values():
            room = -(-len(tokens) * K * thousandths(self.moe["capacity"]) // (1000 * E))
            used = [0] * E
            if self.moe["priority"] == "gate":
                tokens = sorted(tokens, key=lambda t: -priority[t].item())  # stable
                self.gaps["priority"] = min(self.gaps["priority"], -priority[tokens].diff().max().item())
            for k in range(K):
                for t in tokens:
                    e = choice[t, k].item()
                    keep[t, k] = used[e] < room
                    used[e] += keep[t, k].item()
        return keep

    # --- losses

    def contrastive(self):
        """Per pair, mean over pairs, 1 / temperature."""
        scale = self.P["log_scale"][0].exp()
        names = [m["name"] for m in self.modalities]
        pairs = [tuple(names.index(n) for n in p.split(":")) for p in self.config["objective"]["pairs"]]
        if not pairs:
            pairs = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
        losses = [self.pair(a, b, scale) for a, b in pairs]
        return losses, sum(losses) / len(losses), scale

    def pair(self, a, b, scale):
        both = [i for i in range(len(self.batch.samples)) if i in self.z[a] and i in self.z[b]]
        if not both:
            return torch.zeros((), dtype=torch.float64)
        ids, labels = self.batch.ids, self.batch.labels
        masked = torch.tensor([[i != j and (ids[i] == ids[j] or labels[i] == labels[j] >= 0) for j in both]
                               for i in both])
        s = scale * torch.stack([self.z[a][i] for i in both]) @ torch.stack([self.z[b][i] for i in both]).T
        s = s.masked_fill(masked, -math.inf)
        positive = s.diagonal()
        return ((s.logsumexp(1) - positive) / 2 + (s.logsumexp(0) - positive) / 2).mean()

    def router_sums(self):
        """Per layer and modality: tokens, sum z, sum entropy, sum p [E], sum load [E]; and counts: choices
        before drops [E], after drops [E], tokens with a kept choice, tokens."""
        E, K = self.moe["experts"], self.moe["choose"]
        sigma = self.moe["noise"] / E
        values, counts = [], []
        for r in self.routers:
            z = r["logits"].logsumexp(-1) ** 2
            entropy = -(r["prob"] * r["logits"].log_softmax(-1)).sum(-1)
            load = torch.zeros_like(r["prob"])
            if sigma > 0:
                threshold = r["noisy"].topk(K).values[:, K - 1:]
                load = torch.special.ndtr((r["logits"] - threshold) / sigma)  # 1 - Phi(x) = Phi(-x)
            for m in range(len(self.modalities)):
                of = self.batch.modality == m
                values.append(torch.cat([of.sum()[None].double(), z[of].sum()[None], entropy[of].sum()[None],
                                         r["prob"][of].sum(0), load[of].sum(0)]))
                chosen, keep = r["choice"][of], r["keep"][of]
                counts.append(torch.cat([torch.bincount(chosen.flatten(), minlength=E),
                                         torch.bincount(chosen[keep], minlength=E),
                                         keep.any(-1).sum()[None], of.sum()[None]]))
        shape = (len(self.routers), len(self.modalities), -1)
        if not self.routers:
            return None, None
        return torch.stack(values).view(shape), torch.stack(counts).view(shape)

    def router_losses(self, values):
        """Weighted: importance, load, z, local, global."""
        E, weights = self.moe["experts"], self.config["objective"]
        losses = {k: torch.zeros((), dtype=torch.float64)
                  for k in ("importance", "load", "z", "local", "global")}

        def variation(x):
            return x.var(unbiased=False) / x.mean() ** 2

        for layer in values if values is not None else []:
            together = layer.sum(0)
            losses["importance"] += weights["importance"] * variation(together[3:3 + E])
            if self.moe["noise"] > 0:
                losses["load"] += weights["load"] * variation(together[3 + E:] / together[0])
            losses["z"] += weights["z"] * together[1] / together[0]
            for m, settings in enumerate(self.modalities):
                tokens = layer[m][0]
                if tokens == 0:
                    continue
                mean = layer[m][3:3 + E] / tokens
                losses["local"] += settings["local"] * layer[m][2] / tokens
                if settings["experts"] > 0:
                    mean = mean[mean > 0]
                    M = len(self.modalities)
                    own = (m + 1) * E // M - m * E // M if self.moe.get("partition") == "modality" else E
                    hinge = math.log(min(settings["experts"], own)) + (mean * mean.log()).sum()
                    losses["global"] += settings["global"] * torch.clamp(hinge, min=0)
        return losses


# --- the optimizer step -------------------------------------------------------------------------------

def rate(optimizer, t, steps):
    warmup = optimizer["warmup"]
    if warmup < 1:
        warmup = math.ceil(warmup * steps)
    if t < warmup:
        return optimizer["rate"] * (t + 1) / warmup
    share = (t - warmup) / (steps - warmup)
    low, high = optimizer["min_rate"], optimizer["rate"]
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


def decays(name):
    """Weight decay is for matrices: not for norms, biases, embeddings, routers, the temperature."""
    return not (name.endswith("norm.weight") or name.endswith(".bias") or name.endswith((".position", ".query"))
                or ".router." in name or name in ("log_scale", "embedding.weight"))


class Optimizer:
    """AdamW on P, with clipping and the schedule of the configuration."""

    def __init__(self, config, P):
        self.config, self.P, self.settings = config, P, config["optimizer"]
        o, self.t = self.settings, 0
        groups = [{"params": [p for n, p in P.items() if decays(n) == which],
                   "weight_decay": o["weight_decay"] if which else 0.0} for which in (True, False)]
        self.adamw = torch.optim.AdamW(groups, betas=(o["beta1"], o["beta2"]), eps=o["epsilon"])

    def step(self):
        """Returns norm, clipping factor, rate."""
        norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in self.P.values()))
        factor = self.settings["clip"] / norm if norm > self.settings["clip"] else 1.0
        for p in self.P.values():
            p.grad *= factor
        lr = rate(self.settings, self.t, self.config["run"]["steps"])
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            if "log_scale" in self.P:
                self.P["log_scale"].clamp_(max=math.log(self.config["objective"]["largest_scale"]))
        self.t += 1
        return norm, factor, lr


def evaluate(config, P, batch, step):
    """The losses of one batch, as a dictionary, and the tower that gave them."""
    tower = Tower(config, P, batch, step)
    pairs, contrastive, scale = tower.contrastive()
    values, counts = tower.router_sums()
    losses = tower.router_losses(values)
    total = contrastive + sum(losses.values())
    return tower, {"loss": total, "contrastive": contrastive, "scale": scale, "pair": pairs, "values": values,
                   "counts": counts, **losses}
