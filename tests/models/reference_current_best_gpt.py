"""The speedrun's model restated from its equations, token by token and head by head, in fp64, nothing shared with the
project. One row of tokens at a time.

`p` maps our names of parameters and buffers to tensors. `c` says in plain values what each layer has (see `plain` of
test_current_best_gpt.py): layers are numbers from 0, states are counted by boundaries, 0 in front of layer 0.
"""

import math

import torch

from tests.models.reference import softmax

EPS = 2.0**-23


def rms(x):
    return x / torch.sqrt((x * x).sum() / len(x) + EPS)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def mudd(p, name, x, scale=0.1):
    return scale * (p[f"{name}.down.weight"] @ gelu(p[f"{name}.up.weight"] @ x) + p[f"{name}.down.bias"])


def wrapped(number):
    """As 32 bits with a sign."""
    return (number + 2**31) % 2**32 - 2**31


def bigram_row(token, before, rows):
    """Of a token behind another; `before` None at the start."""
    if before is None:
        return rows - 1
    return (wrapped(36313 * token) ^ wrapped(27191 * before)) % (rows - 1)


def befores(docs, c):
    """The place in front of each that it may look at, or None."""
    return [t - 1 if t and (not c.mask or docs[t] == docs[t - 1]) else None for t in range(len(docs))]


def first_states(p, tokens, before, c):
    raw = [p["embed_tokens.weight"][token] for token in tokens]
    found = []
    for t, e in enumerate(raw):
        if c.smear and before[t] is not None:
            gate = sigmoid(p["smear.gate.weight"][0] @ e[:12])
            e = e + p["smear.strength"] * gate * raw[before[t]]
        found.append(rms(e))
    return found


def bigram_vectors(p, tokens, before, c):
    rows, found = len(p["bigrams.table.weight"]), []
    for t, token in enumerate(tokens):
        one_before = None if before[t] is None else tokens[before[t]]
        x = p["bigrams.table.weight"][bigram_row(token, one_before, rows)]
        if c.sign_rows:
            which = 0 if one_before is None else (token ^ one_before) % c.sign_rows
            x = x * p["bigrams.signs"][which].to(x.dtype)
        found.append(torch.cat((x, x.new_zeros(c.width - len(x)))))
    return found


def turned(x, place, c):
    """The pairs of dims that turn, each by its frequency."""
    h, y = len(x), list(x)
    for i, omega in enumerate(c.omega):
        a, b = (2 * i, 2 * i + 1) if c.pair else (i, i + h // 2)
        cos, sin = math.cos(place * omega), math.sin(place * omega)
        y[a], y[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return torch.stack(y)


def standing(h, c):
    moving = {d for i in range(len(c.omega)) for d in ((2 * i, 2 * i + 1) if c.pair else (i, i + h // 2))}
    return [d for d in range(h) if d not in moving]


def look(q, ks, vs, seen, scale):
    """Output of one query over the places `seen`."""
    weights = softmax([scale * (q * ks[s]).sum() for s in seen])
    return sum(w * vs[s] for w, s in zip(weights, seen, strict=True))


def attend(p, name, layer, zs, extra, gates, docs, before, c):
    """Outputs of all tokens. `extra`: per token what is added to its values, (D,) or None."""
    T, h, H = len(zs), c.width // c.heads, c.heads
    lambda_v, lambda_o = p[f"{name}.lambdas"]
    fused = [lambda_v * (p[f"{name}.qkv_proj.weight"] @ z) for z in zs]
    long = layer in c.long
    window = c.windows[long]

    def head(t, part, j):
        return fused[t][part * c.width + j * h : part * c.width + (j + 1) * h]

    v = [[head(t, 2, j) for t in range(T)] for j in range(H)]
    if extra is not None:
        v = [[v[j][t] + extra[t][j * h : (j + 1) * h] for t in range(T)] for j in range(H)]
    paired = layer in c.paired

    def place(t, j):
        return 2 * t + j % 2 if paired else t

    q, k = (
        [[turned(rms(head(t, part, j)), place(t, j), c) for t in range(T)] for j in range(H)]
        for part in (0, 1)
    )
    if long and c.key_offset and not paired:
        dims = standing(h, c)
        old = k
        k = []
        for j in range(H):
            row = []
            for t in range(T):
                source = t if before[t] is None else before[t]
                row.append(torch.stack([old[j][source][d] if d in dims else old[j][t][d] for d in range(h)]))
            k.append(row)

    ys = [[None] * H for _ in range(T)]
    if paired:
        for j in range(H // 2):
            both = (j, j + H // 2)
            qs, ks, vs = ([x[i][t] for t in range(T) for i in both] for x in (q, k, v))
            for n in range(2 * T):
                seen = [s for s in range(n + 1) if docs[s // 2] == docs[n // 2] and n - s <= window]
                ys[n // 2][both[n % 2]] = look(qs[n], ks, vs, seen, c.scale)
    else:
        for t in range(T):
            seen = [s for s in range(t + 1) if docs[s] == docs[t] and t - s <= window]
            for j in range(H):
                ys[t][j] = look(q[j][t], k[j], v[j], seen, c.scale)
    for t in range(T):
        if layer in c.composed:
            seen = [s for s in range(t + 1) if docs[s] == docs[t] and t - s < c.dc_window]
            read, write = rms(gates[t]["read"]), gates[t]["write"]
            maps = [softmax([c.scale * (q[m][t] * k[m][s]).sum() for s in seen]) for m in range(H)]
            one = sum(read[m] * maps[m] for m in range(H))
            for j in range(H):
                ys[t][j] = ys[t][j] + write[j] * sum(w * v[j][s] for w, s in zip(one, seen, strict=True))
        if layer in c.xsa:
            for j in range(H):
                own, alpha = v[j][t], torch.tanh(gates[t]["xsa"][j])
                ys[t][j] = ys[t][j] - alpha * (ys[t][j] @ own) / (own @ own) * own
        if layer in c.gated:
            for j in range(H):
                ys[t][j] = ys[t][j] * gates[t]["gate"][j]
    return [lambda_o * (p[f"{name}.o_proj.weight"] @ torch.cat(y)) for y in ys]


def gates_of(p, c, layers, x, which):
    """{layer: {kind: numbers}} of one token."""
    kinds = []
    for layer in layers:
        H, own = c.heads, c.mudd and layer == c.depth - 1
        attends = layer not in c.skipping
        kinds += [(layer, "xsa", H)] if layer in c.xsa else []
        kinds += [(layer, "gate", H)] if layer in c.gated else []
        kinds += [(layer, "x0", 1)] if attends and not own and c.x0 == "gated" else []
        kinds += [(layer, "bigram", 1)] if attends and c.bigrams and (not own or layer == 0) else []
        kinds += [(layer, "skip", 1)] if c.skip and c.skip[1] == layer else []
        kinds += [(layer, "read", H), (layer, "write", H)] if layer in c.composed else []
    if not kinds:
        return {}
    numbers = mudd(p, f"{which}.mudd", x, p["gate_scale"]) if c.mudd_gate else p[f"{which}.fixed"]
    found, at = {}, 0
    for layer, kind, n in kinds:
        found.setdefault(layer, {})[kind] = numbers[at : at + n]
        at += n
    assert at == len(numbers)
    return found


def extra_values(p, name, layer, tokens, zs, c):
    """What a layer with a table adds to its values."""
    if layer not in c.tables:
        return None
    h = c.width // c.heads
    found = []
    for token, z in zip(tokens, zs, strict=True):
        ve = p[f"value_tables.{c.tables[layer]}.weight"][token]
        if not c.ve_gate:
            found.append(p[f"{name}.value_lambda"] * ve)
            continue
        n = min(6, c.width)
        gate = 2 * sigmoid(p[f"{name}.value_gate.weight"] @ torch.cat((z[:n], ve[:n])))
        found.append(torch.cat([gate[j] * ve[j * h : (j + 1) * h] for j in range(c.heads)]))
    return found


def mlp(p, name, x):
    return p[f"{name}.down_proj.weight"] @ torch.clamp(p[f"{name}.up_proj.weight"] @ x, min=0) ** 2


def last_block(p, name, layer, tokens, xs, states, bigrams, gates, docs, before, c):
    """The one whose strengths and mixes are numbers per token."""
    T, h = len(xs), c.width // c.heads
    sources = [states[b] for b in c.mixed]
    n = len(sources) + 1
    of = [mudd(p, f"{name}.mix.mudd", x) for x in xs]
    extra, new, rest = [], [], []
    for t, x in enumerate(xs):
        own = [*(s[t] for s in sources), x]
        extra.append(sum(m * s for m, s in zip(of[t][:n], own, strict=True)))
        new.append(x + sum(m * s for m, s in zip(of[t][n : 2 * n], own, strict=True)))
        left = list(of[t][2 * n :])
        if layer in c.tables:
            halves, left = left[:2], left[2:]
            ve = p[f"value_tables.{c.tables[layer]}.weight"][tokens[t]]
            extra[t] = extra[t] + torch.cat(
                [halves[j // (c.heads // 2)] * ve[j * h : (j + 1) * h] for j in range(c.heads)]
            )
        rest.append(left)
    read = states[c.late[0]] if c.late and layer in c.late[1] else new
    attended = attend(p, f"{name}.self_attn", layer, [rms(z) for z in read], extra, gates, docs, before, c)
    found = []
    for t in range(T):
        rho_a, rho_m, pi_a, pi_m, *more = rest[t]
        x = rho_a * new[t] + pi_a * attended[t]
        if c.x0 == "gated":
            x = x + more.pop(0) * states[0][t]
        if c.bigrams:
            x = x + more.pop(0) * bigrams[t]
        assert not more
        found.append(rho_m * x + pi_m * mlp(p, f"{name}.mlp", rms(x)))
    return found


def block(p, name, layer, tokens, xs, x0s, states, bigrams, gates, docs, before, c):
    T = len(xs)
    if c.skip and c.skip[1] == layer:
        strength = sigmoid(p[f"{name}.skip_lambda"])
        xs = [x + strength * gates[t]["skip"] * states[c.skip[0]][t] for t, x in enumerate(xs)]
    if c.x0 == "scalar":
        a, b = p[f"{name}.x0_lambdas"]
        xs = [a * x + b * x0s[t] for t, x in enumerate(xs)]
    if c.mudd and layer == c.depth - 1:
        return last_block(p, name, layer, tokens, xs, states, bigrams, gates, docs, before, c)
    one = xs[0].new_ones(2)
    rho, pi = (p.get(f"{name}.{factor}", one) for factor in ("rho", "pi"))
    if layer not in c.skipping:
        read = states[c.late[0]] if c.late and layer in c.late[1] else xs
        zs = [rms(z) for z in read]
        extra = extra_values(p, f"{name}.self_attn", layer, tokens, zs, c)
        attended = attend(p, f"{name}.self_attn", layer, zs, extra, gates, docs, before, c)
        new = []
        for t in range(T):
            x = rho[0] * xs[t] + pi[0] * attended[t]
            if c.x0 == "gated":
                x = x + gates[t]["x0"] * x0s[t]
            if c.bigrams and layer > 0:
                x = x + gates[t]["bigram"] * bigrams[t]
            new.append(x)
        xs = new
    return [rho[-1] * x + pi[-1] * mlp(p, f"{name}.mlp", rms(x)) for x in xs]


def current_best_logits(p, tokens, docs, c):
    """(T, V_p)"""
    T, before = len(tokens), befores(docs, c)
    x0s = first_states(p, tokens, before, c)
    bigrams = bigram_vectors(p, tokens, before, c) if c.bigrams else None
    early = [gates_of(p, c, [n for n in range(c.depth) if n < c.gates_from], x, "early_gates") for x in x0s]
    late = [{} for _ in range(T)]
    xs = x0s
    if c.bigrams:
        xs = [x + early[t][0]["bigram"] * bigrams[t] for t, x in enumerate(xs)]
    states, first_half = {0: xs}, []
    for layer in range(c.depth):
        if layer == c.gates_from:
            late = [
                gates_of(p, c, [n for n in range(c.depth) if n >= c.gates_from], x, "late_gates") for x in xs
            ]
        if c.unet and layer >= c.depth - c.depth // 2:
            other = first_half.pop()
            xs = [x + p[f"layers.{layer}.unet_lambda"] * other[t] for t, x in enumerate(xs)]
        gates = [{**early[t].get(layer, {}), **late[t].get(layer, {})} for t in range(T)]
        xs = block(p, f"layers.{layer}", layer, tokens, xs, x0s, states, bigrams, gates, docs, before, c)
        if c.unet and layer < c.depth // 2:
            first_half.append(xs)
        states[layer + 1] = xs
    if c.mudd:
        found = []
        for t, x in enumerate(xs):
            sources = [states[b][t] for b in c.exit]
            sources += [p["value_tables.0.weight"][tokens[t]]] if c.tables else []
            numbers = mudd(p, "exit", x)
            found.append(x + sum(m * s for m, s in zip(numbers, sources, strict=True)))
        xs = found
    logits = torch.stack([p["lm_head.weight"] @ rms(x) for x in xs])
    if c.cap:
        a, b, scale = c.cap
        return a * sigmoid((logits + b) / scale)
    return logits
