"""MEGABYTE from its equations (Yu et al. 2023, section 2.1), one document, one position, head and key at a time, in
fp64. `w(name)` gives a weight; x are the bytes that are predicted: nothing stands in front of them."""

import numpy as np


def layer_norm(x, w, name):
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5) * w(f"{name}.weight") + w(f"{name}.bias")


def rotated(x, position):
    """x (h,), pairs of dims i and i + h/2."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / len(x))
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def mlp(x, w, name, kind):
    up = w(f"{name}.mlp.up_proj.weight") @ x
    if kind == "relu":
        return w(f"{name}.mlp.down_proj.weight") @ np.maximum(up, 0)
    gate = w(f"{name}.mlp.gate_proj.weight") @ x
    return w(f"{name}.mlp.down_proj.weight") @ (gate / (1 + np.exp(-gate)) * up)


def attend(q, seen, heads, rotate):
    """q (position, vector), seen [(position, key, value)] -> (D,); positions turn queries and keys, if `rotate`."""
    width = len(q[1]) // heads
    out = np.zeros_like(q[1])
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = np.empty(len(seen))
        for n, (position, key, _) in enumerate(seen):
            mine, theirs = q[1][part], key[part]
            if rotate:
                mine, theirs = rotated(mine, q[0]), rotated(theirs, position)
            scores[n] = mine @ theirs / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        for n, (_, _, value) in enumerate(seen):
            out[part] += weights[n] * value[part]
    return out


def global_states(cfg, w, x):
    """(K, P D_G): what the global stack says to each of the patches of x (T,)."""
    patch = cfg.patch_size
    h = [w("global_embedding.weight")[b] + w("positions.weight")[t] for t, b in enumerate(x)]
    if cfg.patch_conv:
        for number, width in enumerate((3, 5, 7)):
            mix, before = w(f"convolutions.mixes.{number}.weight"), h
            h = [
                before[t]
                + mix
                @ np.concatenate(
                    [
                        np.maximum(before[s], 0) if s >= 0 else np.zeros_like(before[t])
                        for s in range(t - width + 1, t + 1)
                    ]
                )
                for t in range(len(x))
            ]
    patches = -(-len(x) // patch)
    states = [w("global_pad")]
    for k in range(1, patches):
        states.append(np.concatenate(h[(k - 1) * patch : k * patch]))
    for layer in range(cfg.n_layers_d_global):
        name = f"global_layers.{layer}"
        normed = [layer_norm(s, w, f"{name}.attention_norm") for s in states]
        project = [w(f"{name}.attention.{p}_proj.weight") for p in "qkvo"]
        after = []
        for k in range(patches):
            seen = [(j, project[1] @ normed[j], project[2] @ normed[j]) for j in range(k + 1)]
            y = attend((k, project[0] @ normed[k]), seen, cfg.global_n_heads, rotate=False)
            s = states[k] + project[3] @ y
            after.append(s + mlp(layer_norm(s, w, f"{name}.mlp_norm"), w, name, cfg.mlp_type))
        states = after
    return np.stack([layer_norm(s, w, "global_norm") for s in states])


def logits(cfg, w, x):
    """(T, V): row t is the distribution of x[t]."""
    patch, reach, width = cfg.patch_size, cfg.reach, cfg.d_global_pre_patch
    said = global_states(cfg, w, x)
    states = {}  # by (patch, place)
    for t in range(len(x)):
        k, p = divmod(t, patch)
        own = w("local_pad") if p == 0 else w("local_embedding.weight")[x[t - 1]]
        states[k, p] = w("to_local.weight") @ said[k, p * width : (p + 1) * width] + own
    for layer in range(cfg.n_layers_d_local):
        name = f"local_layers.{layer}"
        project = [w(f"{name}.attention.{p}_proj.weight") for p in "qkvo"]
        normed = {at: layer_norm(s, w, f"{name}.attention_norm") for at, s in states.items()}
        after = {}
        for (k, p), s in states.items():
            seen = []
            if k > 0:
                for r in range(reach, 0, -1):  # relative positions -r to -1
                    n = normed[k - 1, patch - r]
                    seen.append((-r, project[1] @ n, project[2] @ n))
            for j in range(p + 1):
                seen.append((j, project[1] @ normed[k, j], project[2] @ normed[k, j]))
            y = attend((p, project[0] @ normed[k, p]), seen, cfg.local_n_heads, rotate=True)
            s = s + project[3] @ y
            after[k, p] = s + mlp(layer_norm(s, w, f"{name}.mlp_norm"), w, name, cfg.mlp_type)
        states = after
    head = w("local_embedding.weight")[: cfg.vocab_size]
    return np.stack([head @ layer_norm(states[divmod(t, patch)], w, "local_norm") for t in range(len(x))])
