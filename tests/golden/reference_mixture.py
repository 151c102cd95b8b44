"""Mixtures of METHODS sections 3 and 4, in PyTorch, float64, in the tower of reference.py and the decoder of
reference_decoder.py: counts of experts by layer, added experts with columns of their own, calibrated gates, a drawn
second choice, balance losses.
"""

import numpy as np
import torch

import reference
import reference_decoder

SECOND_PURPOSE = 8
LEAST = 1e-6


def experts_of(config, index):
    """Experts of the index-th MoE layer, and how many of them are added."""
    moe = config["model"]["moe"]
    return (moe["layer_experts"][index] if moe.get("layer_experts") else moe["experts"],
            moe["added"][index] if moe.get("added") else 0)


def most_experts(config):
    moe = config["model"]["moe"]
    return max(moe.get("layer_experts") or [moe["experts"]])


class Mixture:
    """What replaces the mixture of reference.Tower; comes before it among the bases."""

    def column(self, name, old, added, bias):
        """Old and added columns of the router as one; a missing old bias is 0."""
        parts = [self.P[name % ""]] if name % "" in self.P else [torch.zeros(old, dtype=torch.float64)]
        if added:
            parts.append(self.P[name % "added."] if not bias or name % "added." in self.P
                         else torch.zeros(added, dtype=torch.float64))
        return torch.cat(parts)

    def logits(self, layer, x, E, added):
        prefix = "blocks.%d.router." % layer
        return (x @ self.column(prefix + "%sweight", E - added, added, False).T
                + self.column(prefix + "%sbias", E - added, added, True))

    def drawn(self, logits, choice):
        """choice with the second drawn: the largest logit plus Gumbel noise without the first."""
        E = logits.shape[1]
        stream = reference.xxhash64_words([SECOND_PURPOSE, self.step, len(self.routers)])
        index = np.asarray(self.batch.key, dtype=np.uint64)[:, None] * np.uint64(E) + np.arange(E, dtype=np.uint64)
        c = reference.philox(self.config["run"]["seed"], stream, index)
        unit = (((c[1] << np.uint64(32) | c[0]) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0 ** -53
        with torch.no_grad():
            value = logits + torch.from_numpy(-np.log(-np.log(unit)))
            value.scatter_(1, choice[:, :1], -torch.inf)
        best = value.topk(2, -1)
        self.gaps["logit"] = min(self.gaps["logit"], (best.values[:, 0] - best.values[:, 1]).min().item())
        return torch.stack([choice[:, 0], best.indices[:, 0]], 1)

    def corrected(self, layer, x, prob):
        """Weights of all experts before they are divided."""
        adds = self.moe["calibration"] == "add"
        name = "blocks.%d.calibration." % layer
        hidden = torch.nn.functional.gelu((prob if adds else x) @ self.P[name + "in.weight"].T)
        correction = hidden @ self.P[name + "out.weight"].T
        return (prob + correction if adds else prob * (1 + correction)).clamp(min=LEAST)

    def gates(self, layer, x, prob, choice, added):
        divided = self.moe["gate"] == "renormalised"
        weight = prob
        if added and self.moe.get("calibration", "none") != "none":
            weight, divided = self.corrected(layer, x, prob), self.moe["calibration_renormalize"]
        weight = weight.gather(1, choice)
        return weight / weight.sum(-1, keepdim=True) if divided else weight

    def mixture(self, layer, x):
        K = self.moe["choose"]
        E, added = experts_of(self.config, len(self.routers))
        self.moe = {**self.moe, "experts": E}  # what the noise and the capacity hang on
        logits = self.logits(layer, x, E, added)
        noisy = logits + self.noise(E) if self.moe["noise"] > 0 else logits
        order = torch.sort(-noisy.detach(), dim=-1, stable=True)
        choice = order.indices[:, :K]
        self.gaps["logit"] = min(self.gaps["logit"], order.values.diff(dim=-1)[:, :K].min().item())
        if self.moe.get("second_noise", "none") == "gumbel":
            choice = self.drawn(logits, choice)
        noisy_prob = noisy.softmax(-1)
        gate = self.gates(layer, x, noisy_prob, choice, added)
        keep = self.keep(choice, noisy_prob.detach().max(-1).values)
        y = torch.zeros_like(x)
        for e in range(E):
            token, k = torch.nonzero((choice == e) & keep, as_tuple=True)
            out = self.feed_forward("blocks.%d.experts.%d" % (layer, e), x[token])
            y = y.index_add(0, token, gate[token, k, None] * out)
        self.routers.append({"logits": logits, "noisy": noisy, "prob": logits.softmax(-1), "choice": choice,
                             "keep": keep})
        return y

    # --- sums and losses

    def router_sums(self):
        """As reference.Tower's, a layer's numbers followed by zeros up to the largest layer's."""
        most, K, values, counts = most_experts(self.config), self.moe["choose"], [], []

        def padded(parts, length):
            x = torch.cat(parts)
            return torch.cat([x, x.new_zeros(length - len(x))])

        for r in self.routers:
            E = r["logits"].shape[1]
            sigma = self.moe["noise"] / E
            z = r["logits"].logsumexp(-1) ** 2
            entropy = -(r["prob"] * r["logits"].log_softmax(-1)).sum(-1)
            load = torch.zeros_like(r["prob"])
            if sigma > 0:
                threshold = r["noisy"].topk(K).values[:, K - 1:]
                load = torch.special.ndtr((r["logits"] - threshold) / sigma)
            for m in range(len(self.modalities)):
                of = self.batch.modality == m
                chosen, keep = r["choice"][of], r["keep"][of]
                values.append(padded([of.sum()[None].double(), z[of].sum()[None], entropy[of].sum()[None],
                                      r["prob"][of].sum(0), load[of].sum(0)], 3 + 2 * most))
                counts.append(padded([torch.bincount(chosen.flatten(), minlength=E),
                                      torch.bincount(chosen[keep], minlength=E), keep.any(-1).sum()[None],
                                      of.sum()[None]], 2 * most + 2))
        shape = (len(self.routers), len(self.modalities), -1)
        return torch.stack(values).view(shape), torch.stack(counts).view(shape)

    def router_losses(self, values):
        losses = {}
        for index, layer in enumerate(values):
            E, _ = experts_of(self.config, index)
            self.moe = {**self.moe, "experts": E}
            for key, loss in super().router_losses(layer[None, :, :3 + 2 * E]).items():
                losses[key] = losses.get(key, 0) + loss
        return losses

    def balance(self):
        """E sum_e me_e ce_e, mean over groups with tokens, mean over layers."""
        weights, size = self.config["objective"], self.moe["group_samples"]
        sample = torch.tensor(self.batch.sample)
        group = sample // size if weights["balance_scope"] == "local" else torch.zeros_like(sample)
        layers = []
        for r in self.routers:
            E = r["prob"].shape[1]
            chosen = torch.nn.functional.one_hot(r["choice"], E).double()
            share = chosen[:, 0] if weights["balance_shares"] == "first" else chosen.mean(1)
            of = [group == g for g in group.unique()]
            layers.append(sum(E * (r["prob"][t].mean(0) * share[t].mean(0)).sum() for t in of) / len(of))
        return weights["balance"] * sum(layers) / len(layers)


class Tower(Mixture, reference.Tower):
    pass


class Decoder(Mixture, reference_decoder.Decoder):
    pass


def evaluate(config, P, batch, step):
    """The losses of one batch, as a dictionary, and the model that gave them."""
    if config["model"]["kind"] == "decoder":
        model = Decoder(config, P, batch, step)
        main, contrastive, scale = model.losses.mean(), 0.0, 0.0
        pairs = [main]
    else:
        model = Tower(config, P, batch, step)
        pairs, main, scale = model.contrastive()
        contrastive = main
    values, counts = model.router_sums()
    losses, balance = model.router_losses(values), model.balance()
    return model, {"loss": main + balance + sum(losses.values()), "contrastive": contrastive, "scale": scale, "pair": pairs,
                   "values": values, "counts": counts, "balance": balance, **losses}
