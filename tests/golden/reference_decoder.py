"""The decoder of METHODS section 3, in PyTorch, float64, beside reference.py, whose mixture, router sums and router
losses it uses:

    [modalities without a mark][prompt with latents in place of marks][response] -> causal blocks -> RMSNorm -> logits

All rows of a batch lie in one matrix, sample by sample.
"""

import math

import torch

import reference


class Batch:
    """sample[i] = (id, label, [latents of each modality, [t, D]], prompt, target).  Rows are ("latent", m, t) or
    ("token", v); modality[row] is m, or M for a token."""

    def __init__(self, samples, modalities, queries=None):
        self.samples, self.M = samples, modalities
        self.items, self.rows, self.sample, self.modality, self.key, self.position = [], [], [], [], [], []
        self.predictions = []  # (sample, number in the response, row that predicts, token)
        for i, (_, _, latents, prompt, target) in enumerate(samples):
            before = [(("latent", m, t), m) for m in range(modalities) if -1 - m not in prompt
                      for t in range(reference.rows_of(latents[m], m, queries))]
            for v in prompt:
                if v >= 0:
                    before.append((("token", v), modalities))
                else:
                    before += [(("latent", -1 - v, t), -1 - v)
                               for t in range(reference.rows_of(latents[-1 - v], -1 - v, queries))]
            first, rows = len(self.rows), before + [(("token", v), modalities) for v in target]
            self.items.append((i, None, first, len(rows)))
            for position, (row, kind) in enumerate(rows):
                self.rows.append(row)
                self.sample.append(i)
                self.modality.append(kind)
                self.position.append(position)
                self.key.append(i * modalities * 2 ** 24 + position)
            for j, v in enumerate(target):
                if len(before) + j > 0:
                    self.predictions.append((i, j, first + len(before) + j - 1, v))
        self.modality = torch.tensor(self.modality)
        self.tokens = len(self.rows)


def frequencies(model, A):
    """[A / 2], scaled as model.rope_scaling says (Dubey et al. 2024 for llama3)."""
    plain = model["rope_base"] ** (-torch.arange(A // 2, dtype=torch.float64) * 2 / A)
    s = model["rope_scaling"]
    if s["kind"] == "none":
        return plain
    if s["kind"] == "linear":
        return plain / s["factor"]
    length = 2 * math.pi / plain
    share = (s["length"] / length - s["low"]) / (s["high"] - s["low"])
    blended = (1 - share) * plain / s["factor"] + share * plain
    slow, fast = length > s["length"] / s["low"], length < s["length"] / s["high"]
    return torch.where(slow, plain / s["factor"], torch.where(fast, plain, blended))


class Decoder(reference.Tower):
    """One forward pass; leaves self.losses, one for each prediction of the batch, and self.routers."""

    def __init__(self, config, P, batch, step):
        self.config, self.model, self.moe = config, config["model"], config["model"]["moe"]
        self.P, self.batch, self.step = P, batch, step
        self.modalities = config["data"]["modalities"] + [
            {"name": "vocabulary", "local": 0.0, "global": 0.0, "experts": 0.0}]
        self.routers, self.own_trunks = [], False
        self.gaps = {"logit": math.inf, "priority": math.inf}
        x = self.embedded = self.embed()
        for layer in range(self.model["layers"]):
            x = x + self.attention(layer, self.norm(x, "blocks.%d.attention_norm" % layer))
            h = self.norm(x, "blocks.%d.forward_norm" % layer)
            if reference.is_moe(self.moe["layers"], self.model["layers"], layer):
                x = x + self.mixture(layer, h)
            else:
                x = x + self.feed_forward("blocks.%d.feed_forward" % layer, h)
        head = P["embedding.weight" if self.model["tied"] else "output.weight"]
        self.logits = self.norm(x, "final_norm") @ head.T
        rows = torch.tensor([row for _, _, row, _ in batch.predictions])
        tokens = torch.tensor([v for _, _, _, v in batch.predictions])
        chosen = self.logits[rows]
        self.losses = chosen.logsumexp(-1) - chosen.gather(1, tokens[:, None])[:, 0]

    def embed(self):
        latents = {(i, m): self.connect(i, m) for i, sample in enumerate(self.batch.samples)
                   for m in range(self.batch.M) if len(sample[2][m]) > 0}
        return torch.stack([self.P["embedding.weight"][row[1]] if row[0] == "token"
                            else latents[i, row[1]][row[2]]
                            for i, row in zip(self.batch.sample, self.batch.rows)])

    def rotate(self, x):
        n, _, A = x.shape
        angle = torch.arange(n, dtype=torch.float64)[:, None, None] * frequencies(self.model, A)
        a, b = x[..., :A // 2], x[..., A // 2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def attention(self, layer, x):
        H, G = self.model["heads"], self.model["kv_heads"] or self.model["heads"]
        A = self.model["head_width"] or self.model["width"] // H
        name = "blocks.%d.attention." % layer
        qkv = x @ self.P[name + "qkv.weight"].T
        if self.model["qkv_bias"]:
            qkv = qkv + self.P[name + "qkv.bias"]
        out = []
        for _, _, first, n in self.batch.items:
            rows = qkv[first:first + n]
            q = self.rotate(rows[:, :H * A].view(n, H, A))
            k = self.rotate(rows[:, H * A:(H + G) * A].view(n, G, A))
            v = rows[:, (H + G) * A:].view(n, G, A)
            k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
            score = torch.einsum("ihc,jhc->hij", q, k) / math.sqrt(A)
            later = torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1)
            score = score.masked_fill(later, -math.inf)
            out.append(torch.einsum("hij,jhc->ihc", score.softmax(-1), v).reshape(n, H * A))
        return torch.cat(out) @ self.P[name + "out.weight"].T


def evaluate(config, P, batch, step):
    """The losses of one batch, as a dictionary, and the decoder that gave them."""
    decoder = Decoder(config, P, batch, step)
    next_token = decoder.losses.mean()
    values, counts = decoder.router_sums()
    losses = decoder.router_losses(values)
    total = next_token + sum(losses.values())
    return decoder, {"loss": total, "contrastive": 0.0, "scale": 0.0, "pair": [next_token], "values": values,
                     "counts": counts, **losses}
