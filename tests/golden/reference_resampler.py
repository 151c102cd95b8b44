"""The resampler of METHODS section 3 for one item, in PyTorch, float64, with PyTorch's own layer norm and attention:

    queries -> depth x [self-attention -> cross-attention to the latents -> MLP], pre-LayerNorm, residual -> linear
"""

import torch

functional = torch.nn.functional


def shapes(settings, model, width, name):
    """Parameters by name; width: of the latents."""
    C, Q = model["width"], settings["queries"]
    W = settings["hidden"] or C
    out = {name + "query": (Q, W), name + "out.weight": (C, W), name + "out.bias": (C,)}
    for layer in range(settings["depth"]):
        for part, rows, columns in (("self.qkv", 3 * W, W), ("self.out", W, W), ("cross.q", W, W),
                                    ("cross.kv", 2 * W, width), ("cross.out", W, W), ("forward.in", 4 * W, W),
                                    ("forward.out", W, 4 * W)):
            out["%slayers.%d.%s.weight" % (name, layer, part)] = (rows, columns)
            out["%slayers.%d.%s.bias" % (name, layer, part)] = (rows,)
        for part in ("self_norm", "cross_norm", "forward_norm"):
            out["%slayers.%d.%s.weight" % (name, layer, part)] = (W,)
            out["%slayers.%d.%s.bias" % (name, layer, part)] = (W,)
    return out


def attend(q, k, v, heads):
    q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)


def resample(latents, settings, model, P, name):
    """latents [t, D], standardised -> [queries, C]."""
    x = P[name + "query"]
    W, heads = x.shape[1], settings["heads"] or model["heads"]

    def linear(rows, part):
        return functional.linear(rows, P[part + ".weight"], P[part + ".bias"])

    def norm(rows, part):
        return functional.layer_norm(rows, (W,), P[part + ".weight"], P[part + ".bias"], model["norm_epsilon"])

    for layer in range(settings["depth"]):
        own = "%slayers.%d." % (name, layer)
        q, k, v = linear(norm(x, own + "self_norm"), own + "self.qkv").split(W, dim=-1)
        x = x + linear(attend(q, k, v, heads), own + "self.out")
        k, v = linear(latents, own + "cross.kv").split(W, dim=-1)
        q = linear(norm(x, own + "cross_norm"), own + "cross.q")
        x = x + linear(attend(q, k, v, heads), own + "cross.out")
        h = functional.gelu(linear(norm(x, own + "forward_norm"), own + "forward.in"))
        x = x + linear(h, own + "forward.out")
    return linear(x, name + "out")
