"""Exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from naming import require_fit, shapes_and_dtypes


class EMA:
    """shadow <- d shadow + (1 - d) weight with d = min(decay, (1 + k) / (10 + k)) in update k = 1, 2, ...

    The bound on d forgets the initial weights quickly (as in tf.train.ExponentialMovingAverage with
    `num_updates`). The shadow starts at the current weights, is at least fp32 and holds trainable
    parameters only.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]], decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay must satisfy 0 < decay < 1 to be on, got {decay}")
        self.decay = decay
        self._parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.shadow: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }
        device = next(iter(self.shadow.values())).device
        self._updates = torch.zeros((), dtype=torch.int64, device=device)
        self._swapped = False

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """Follow the weights after a step; `found_inf` = 1 (device scalar) leaves everything as it is."""
        assert not self._swapped, "EMA.update inside EMA.swap would average the average"
        if found_inf is None:
            found_inf = torch.zeros((), device=self._updates.device)
        skip = found_inf > 0
        weights = {dtype: self._weight(dtype, skip) for dtype in {s.dtype for s in self.shadow.values()}}
        for name, parameter in self._parameters.items():
            shadow = self.shadow[name]
            shadow.lerp_(parameter.to(shadow.dtype), weights[shadow.dtype])
        self._updates += (~skip).to(torch.int64)

    def _weight(self, dtype: torch.dtype, skip: Tensor) -> Tensor:
        """1 - d as a device scalar, 0 for a skipped step."""
        # 1 - (1 + k) / (10 + k) = 9 / (10 + k), without cancellation; k counts this update.
        weight = (9.0 / (11.0 + self._updates.to(dtype))).clamp(min=1.0 - self.decay)
        return torch.where(skip, 0.0, weight)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Run the body with the averaged weights in the model; the raw ones always come back, bit for bit."""
        backup = {name: p.detach().clone() for name, p in self._parameters.items()}
        nested, self._swapped = self._swapped, True
        try:
            self._write(self.shadow)
            yield
        finally:
            self._write(backup)
            self._swapped = nested

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def restart(self, shadow: dict[str, Tensor] | None = None) -> None:
        """Begin anew, from another average ({name: tensor}) or from the present weights."""
        given = {name: p.detach() for name, p in self._parameters.items()} if shadow is None else shadow
        self.load_state_dict(
            {
                "shadow": {
                    n: t.to(self.shadow[n].dtype) if n in self.shadow else t for n, t in given.items()
                },
                "updates": torch.zeros_like(self._updates),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """{"updates": int64 scalar, "shadow": {name: tensor}}: the live tensors, not copies."""
        return {"updates": self._updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Copy a saved average in place. Raises ValueError, before any change, where it does not fit."""
        given = saved["shadow"]
        require_fit("the saved average (EMA)", shapes_and_dtypes(self.shadow), shapes_and_dtypes(given))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in given.values()):
            raise ValueError("the saved average (EMA) holds numbers that are not finite")
        for name, live in self.shadow.items():
            live.copy_(given[name])
        self._updates.copy_(saved["updates"])
