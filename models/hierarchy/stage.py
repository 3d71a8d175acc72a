"""One stage of a hierarchy around the next (Hwang et al. 2025, arXiv:2507.07955, section 2): every place is encoded, a
router opens chunks, what opens one goes into the stage within, and what comes out is smoothed, laid over the places of
its chunk, added to what was encoded, and decoded. The baseline of `models/hierarchy/pooling.py` makes chunks otherwise.

Shapes: B rows of the batch, R rows, M places, C chunks, D width of this stage, E width of the one within.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.choose import UsesKernels
from kernels.compaction import compaction
from kernels.downsample import downsample
from kernels.precision import at_least_fp32, own_dtypes
from kernels.upsample import taken, upsample
from models.hierarchy.cache import RowsOf
from models.hierarchy.chunking import smoothed, straight_through
from models.hierarchy.config import HierarchyConfig
from models.hierarchy.layers import Stack
from models.hierarchy.places import Places
from models.hierarchy.pooling import Pooling, one_empty
from models.hierarchy.routing import FixedRouter, Routed, Router
from models.layers.decoder import document_positions
from models.layers.flops import Flops, matmul_flops

__all__ = ["Stage", "Told"]


@dataclass
class Told:
    """What a stage tells of its places, (B,) each: how many there are, how many opened a chunk, the sum of their
    probabilities, and that of those which opened one; and the bytes at which chunks begin, (B, T) bool."""

    places: list[Tensor] = field(default_factory=list)
    opened: list[Tensor] = field(default_factory=list)
    probability: list[Tensor] = field(default_factory=list)
    probability_opened: list[Tensor] = field(default_factory=list)
    boundaries: list[Tensor] = field(default_factory=list)

    def stacked(self) -> dict[str, Tensor]:
        """(S, B) each, or (S, B, T), over the stages that cut chunks, from the outermost in."""
        return {name: torch.stack(parts) for name, parts in vars(self).items()}


class Stage(UsesKernels):
    def __init__(self, cfg: HierarchyConfig, number: int = 0) -> None:
        super().__init__()
        self.cfg, self.number = cfg, number
        stages = cfg.stages
        self.sizes = sizes = stages[number]
        padding = sizes.width - stages[number - 1].width if number else 0
        self.pad_dimension = nn.Parameter(torch.empty(padding)) if padding else None
        self.outer = outer = sizes.ratio is not None
        self.main_network: Stage | Stack
        if not outer:
            self.main_network = Stack(cfg, sizes, sizes.layers[0], f"{number}.main")
            return
        self.encoder = Stack(cfg, sizes, sizes.layers[0], f"{number}.encoder")
        self.main_network = Stage(cfg, number + 1)
        self.decoder = Stack(cfg, sizes, sizes.layers[1], f"{number}.decoder")
        self.routing_module: Router | FixedRouter
        dynamic = cfg.chunking == "dynamic"
        self.routing_module = Router(sizes.width) if dynamic else FixedRouter(int(sizes.ratio or 0))
        pools = cfg.pools and not dynamic
        self.pooling = Pooling(sizes.width, int(sizes.ratio or 0)) if pools else None
        self.residual_proj = nn.Linear(sizes.width, sizes.width)

    def forward(
        self, x: Tensor, places: Places, packed: bool, told: Told, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """x (R, M, D of the stage before) -> the same shape. Adds to `told`. `cu_seqlens` as in `Stack`."""
        width = x.shape[-1]
        x = self._widened(x)
        if isinstance(self.main_network, Stack):
            return self.main_network(x, places, cu_seqlens)[..., :width]
        encoded = self.encoder(x, places, cu_seqlens)
        routed = self.routing_module(encoded, places.begins, self._positions(places), places.valid)
        p, opens = routed.p, routed.opens
        self._tell(told, places, p, opens)
        within, source, chunk = places.chunks(opens, packed, self.kernels)
        # Packed chunks are of all places end to end.
        flat = (lambda t: t.flatten(0, 1)[None]) if packed else (lambda t: t)
        if self.pooling is not None:
            if not source.shape[1]:
                within, source = one_empty(places, packed)
            within = replace(within, bytes=taken(flat(places.bytes), self.pooling.held(source)[..., 0]))
            z = self.main_network(self.pooling(flat(encoded), source), within, packed, told).to(p.dtype)
            ended = self._counted(places) >= self.pooling.every  # not before a document's first chunk
            x = self._decode(z, chunk.clamp(min=0), encoded, ended.to(p.dtype), places, cu_seqlens)
            return x[..., :width]
        x, weight = downsample(flat(encoded), flat(p), flat(opens), source, chunk, kernels=self.kernels)
        inner = self.main_network(x, within, packed, told)
        z = smoothed(inner, weight, within.begins, self.cfg.ema_eps, self.kernels)
        scale = straight_through(routed.confidence)
        return self._decode(z, chunk, encoded, scale, places, cu_seqlens)[..., :width]

    def _decode(
        self,
        z: Tensor,
        chunk: Tensor,
        encoded: Tensor,
        scale: Tensor,
        places: Places | RowsOf,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """z (R', C, D), and the chunk of each place, (R, M), or of all of them end to end, (1, R M); scale (R, M)."""
        exact = z.dtype
        with own_dtypes(z.device):
            residual = F.linear(
                encoded.to(exact), self.residual_proj.weight.to(exact), self.residual_proj.bias.to(exact)
            )
        scale = scale.reshape(chunk.shape)
        residual = residual.reshape(*chunk.shape, -1)
        x = upsample(z, chunk, scale, residual, dtype=encoded.dtype, kernels=self.kernels)
        x = x.view(encoded.shape)
        if isinstance(places, RowsOf):
            return self.decoder.step(x, places)
        return self.decoder(x, places, cu_seqlens)

    def _widened(self, x: Tensor) -> Tensor:
        """With the channels that this stage has and the one before has not."""
        if self.pad_dimension is None:
            return x
        padding = self.pad_dimension.to(x.dtype).expand(*x.shape[:-1], -1)
        return torch.cat((x, padding), dim=-1)

    def _positions(self, places: Places) -> Tensor | None:
        """(R, M), where the router asks for them. A chunk that is pooled stands at its last place."""
        if self.pooling is not None:
            return self._counted(places)
        return document_positions(places.ids) if isinstance(self.routing_module, FixedRouter) else None

    def _counted(self, places: Places) -> Tensor:
        """(R, M): which place of its document each is, from 1."""
        return document_positions(places.ids) + 1

    def _tell(self, told: Told, places: Places, p: Tensor, opens: Tensor) -> None:
        exact = p.dtype
        told.places.append(places.total(torch.ones_like(p)))
        told.opened.append(places.total(opens.to(exact)))
        told.probability.append(places.total(p))
        told.probability_opened.append(places.total(p.detach() * opens))
        if self.pooling is not None:  # chunks begin at their first places
            first = self._counted(places) % self.pooling.every == 1
            opens = first if places.valid is None else first & places.valid
        told.boundaries.append(places.at_bytes(opens))

    # -- behind a cache --------------------------------------------------------------------------------------------

    def step(self, x: Tensor, at: RowsOf) -> Tensor:
        """x (R, M, D of the stage before), which follows what the cache holds of these rows: only rows that open a
        chunk go through the stage within. Waits for the device."""
        width = x.shape[-1]
        x = self._widened(x)
        if isinstance(self.main_network, Stack):
            return self.main_network.step(x, at)[..., :width]
        encoded = self.encoder.step(x, at)
        name = f"{self.number}"
        past = at.read(f"{name}.places")[:, None] + torch.arange(x.shape[1], device=x.device)  # (R, M)
        counted = past if self.pooling is None else past + 1
        routed = self.routing_module(encoded, past == 0, counted, None, at.read(f"{name}.routed"))
        at.write(f"{name}.places", past[:, -1] + 1)
        at.write(f"{name}.routed", routed.last)
        z = self._chunks(encoded, routed, at, f"{name}.smoothed")
        scale = straight_through(routed.confidence)
        return self._decode(z, routed.opens.cumsum(1), encoded, scale, at)[..., :width]

    def _chunks(self, encoded: Tensor, routed: Routed, at: RowsOf, name: str) -> Tensor:
        """(R, 1 + C, D): the chunk that goes on from before, 0 where there was none, and those that open here."""
        p, opens = routed.p, routed.opens
        counts = opens.sum(1).cpu()
        before = at.read(name)
        most = int(counts.max())
        z = torch.cat((before[:, None], before.new_zeros(len(before), most, before.shape[1])), dim=1)
        held = None if self.pooling is None else self._held(encoded, at)
        for count in sorted(set(counts.tolist()) - {0}):
            # Rows that open equally many go on together: none is padded.
            chosen = (counts == count).nonzero()[:, 0]
            rows = chosen.to(z.device)
            if self.pooling is not None and held is not None:
                ends = opens[rows].nonzero()[:, 1].view(-1, count)
                pooled = self.pooling(
                    held[rows], ends + self.pooling.every - 1
                )  # what is held begins earlier
                inner = self.main_network.step(pooled, at.among(chosen))
                z[rows, 1 : 1 + count] = inner.to(z.dtype)
                continue
            numbers = compaction(opens[rows], count, kernels=self.kernels)
            x, weight = downsample(encoded[rows], p[rows], opens[rows], *numbers, kernels=self.kernels)
            inner = self.main_network.step(x, at.among(chosen))
            new = smoothed(inner, weight, None, self.cfg.ema_eps, self.kernels, before[rows])
            z[rows, 1 : 1 + count] = new
        at.write(name, taken(z, opens.sum(1, keepdim=True))[:, 0])
        return z

    def _held(self, encoded: Tensor, at: RowsOf) -> Tensor:
        """(R, N - 1 + M, D): what is encoded, behind what the cache holds of a chunk that is not whole yet."""
        name, places = f"{self.number}.unpooled", encoded.shape[1]
        held = torch.cat((at.read(name).to(encoded.dtype), encoded), dim=1)
        at.write(name, held[:, places:])
        return held

    def empty(self, rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of a cache, as `Stack.empty`, this stage and those within."""
        states, counts = self.main_network.empty(rows)
        if not self.outer:
            return states, counts
        like = self.residual_proj.weight
        exact = at_least_fp32(like.dtype)
        name, width = f"{self.number}", self.sizes.width
        states |= {
            f"{name}.places": like.new_zeros(rows, dtype=torch.int64),
            f"{name}.routed": like.new_zeros(rows, width, dtype=exact),
            f"{name}.smoothed": like.new_zeros(rows, width, dtype=exact),
        }
        if self.pooling is not None:
            states[f"{name}.unpooled"] = like.new_zeros(rows, self.pooling.every - 1, width, dtype=exact)
        for stack in (self.encoder, self.decoder):
            more, held = stack.empty(rows)
            states, counts = states | more, counts | held
        return states, counts

    # -- what is said of it ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, residuals: int = 0) -> None:
        """`residuals`: additions to the residual streams of the stages around this one."""
        residuals += self.sizes.residuals
        if self.pad_dimension is not None:
            nn.init.zeros_(self.pad_dimension)
        if isinstance(self.main_network, Stack):
            self.main_network.init_weights(generator, residuals)
            return
        self.encoder.init_weights(generator, residuals)
        self.main_network.init_weights(generator, residuals)
        self.decoder.init_weights(generator, residuals)
        if isinstance(self.routing_module, Router):
            self.routing_module.init_weights()
        if self.pooling is not None:
            self.pooling.init_weights(generator)
        nn.init.zeros_(self.residual_proj.weight)
        nn.init.zeros_(self.residual_proj.bias)

    def blocks(self) -> list[str]:
        """In the order in which they run."""
        if isinstance(self.main_network, Stack):
            return [f"main_network.layers.{i}" for i in range(len(self.main_network.layers))]
        return [
            *(f"encoder.layers.{i}" for i in range(len(self.encoder.layers))),
            *(f"main_network.{path}" for path in self.main_network.blocks()),
            *(f"decoder.layers.{i}" for i in range(len(self.decoder.layers))),
        ]

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        call = {"columns": self.sizes.width}
        if not self.outer:
            return {}
        if self.pooling is not None:
            return {"compaction": {}, "upsample": call}
        return {"compaction": {}, "downsample": call, "linear_scan": call, "upsample": call}

    def flops(self, lengths: list[Any], longest: int) -> Flops:
        """Per byte, where rows hold `lengths` places in this stage and those within, of `longest` bytes."""
        if isinstance(self.main_network, Stack):
            return self.main_network.flops(lengths[0], longest)
        weights = self.sizes.width**2 * (3 if isinstance(self.routing_module, Router) else 1)
        own = self.encoder.flops(lengths[0], longest) + self.decoder.flops(lengths[0], longest)
        within = self.main_network.flops(lengths[1:], longest)
        if self.pooling is not None:
            within = within + matmul_flops(self.pooling.weights)
        return own + matmul_flops(weights) + within * (lengths[1] / lengths[0])
