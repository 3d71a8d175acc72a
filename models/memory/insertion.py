"""A memory layer within a decoder layer of transformers, whose code is neither copied nor changed.

Between attention and feed-forward layer (A): what attention returns becomes a + memory(r + a), where r entered the
layer, which adds the two itself. Behind both (B): the layer's output is added to. What a pass tells the memory comes in
as an argument of the layer and what the memory tells leaves with its output, so that a layer whose activations are made
again in backward reads the same, and tells nothing twice.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from naming import shorten

if TYPE_CHECKING:
    from models.memory.block import MemoryLayer, Reading
    from models.memory.router import MemoryCache

__all__ = ["Insertion", "Pass"]

ATTENTION = ("self_attn", "attn", "attention")
SAME = 1e-3  # of the largest number: rounding, and nothing else


class Pass:
    """What layers are told of the pass that runs, None outside of one, and what they tell."""

    def __init__(self) -> None:
        self.reading: Reading | None = None
        self.cache: MemoryCache | None = None
        self.told: list[dict[str, Tensor]] = []

    @contextmanager
    def of(self, reading: Reading, cache: MemoryCache | None) -> Iterator[list[dict[str, Tensor]]]:
        """Layers read the memory meanwhile; yields what they tell, in their order."""
        self.reading, self.cache, self.told = reading, cache, []
        try:
            yield self.told
        finally:
            self.reading, self.cache, self.told = None, None, []


class Insertion:
    """Puts a memory into a layer as long as that lasts. ValueError where the layer is not known to have a place."""

    def __init__(self, layer: nn.Module, memory: MemoryLayer, now: Pass) -> None:
        self.memory, self.now, self.run = memory, now, layer.forward
        self.entered: tuple[Tensor, Reading, MemoryCache | None] | None = None
        self.said: dict[str, Tensor] = {}
        if memory.mlp is None:
            attention_of(layer).register_forward_hook(self._behind_attention)
        layer.forward = self.forward  # type: ignore[method-assign]
        layer.register_forward_pre_hook(self._tell, with_kwargs=True)
        layer.register_forward_hook(self._hear)

    def _tell(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "memory_reading": self.now.reading, "memory_cache": self.now.cache}

    def forward(
        self, *args: Any, memory_reading: Reading | None, memory_cache: MemoryCache | None, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The layer's own output, with the memory, and what that tells."""
        if memory_reading is None:
            return self.run(*args, **kwargs), {}
        if self.memory.mlp is not None:
            return self._behind(self.run(*args, **kwargs), memory_reading, memory_cache)
        x = args[0] if args else kwargs["hidden_states"]
        self.entered = x, memory_reading, memory_cache
        try:
            return self.run(*args, **kwargs), self.said
        finally:
            self.entered, self.said = None, {}

    def _behind_attention(self, attention: nn.Module, args: Any, output: Any) -> Any:
        if self.entered is None:
            return None
        branch = _first(output)
        x, reading, cache = self.entered
        added, self.said = self.memory(self.memory.norm(x + branch), reading, cache)
        return _with_first(output, branch + added.to(branch.dtype))

    def _behind(
        self, output: Any, reading: Reading, cache: MemoryCache | None
    ) -> tuple[Any, dict[str, Tensor]]:
        memory, x = self.memory, _first(output)
        assert memory.mlp is not None and memory.mlp_norm is not None
        added, said = memory(memory.norm(x), reading, cache)
        x = x + added.to(x.dtype)
        x = x + memory.mlp(memory.mlp_norm(x)).to(x.dtype)
        return _with_first(output, x), said

    def _hear(self, layer: nn.Module, args: Any, output: tuple[Any, dict[str, Tensor]]) -> Any:
        own, said = output
        if said:
            self.now.told.append(said)
        return own


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, x: Tensor) -> Any:
    """What a layer of transformers returned, a tensor or a tuple, with another one in front."""
    return (x, *output[1:]) if isinstance(output, tuple) else x


def attention_of(layer: nn.Module) -> nn.Module:
    children = dict(layer.named_children())
    found = next((children[name] for name in ATTENTION if name in children), None)
    if found is None:
        raise ValueError(
            f"model_cfg.memory_block_variant=A stands behind a layer's attention, and a {type(layer).__name__} has "
            f"none of {', '.join(ATTENTION)}, but {shorten([*children])}. Nearest: memory_block_variant=B"
        )
    return found


@contextmanager
def required_between(layer: nn.Module) -> Iterator[None]:
    """ValueError unless a pass meanwhile shows that what follows attention reads the sum of what entered the layer and
    of what attention returned: where both read the same, or a norm comes first, there is no place for A."""
    seen: dict[str, Tensor] = {}
    sums: list[bool] = []
    attention = attention_of(layer)

    def enters(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    def returns(module: nn.Module, args: Any, output: Any) -> None:
        seen["branch"] = _first(output)

    def follows(module: nn.Module, args: Any) -> None:
        if "branch" in seen and args and isinstance(args[0], Tensor) and args[0].shape == seen["x"].shape:
            whole = seen["x"] + seen["branch"]
            sums.append(bool((args[0] - whole).abs().max() <= SAME * whole.abs().max()))

    others = [child for child in layer.children() if child is not attention]
    handles = [
        layer.register_forward_pre_hook(enters, with_kwargs=True),
        attention.register_forward_hook(returns),
        *(child.register_forward_pre_hook(follows) for child in others),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not any(sums):
        raise ValueError(
            f"model_cfg.memory_block_variant=A stands between attention and feed-forward layer, and those of a "
            f"{type(layer).__name__} do not follow each other in that way. Nearest: memory_block_variant=B"
        )
