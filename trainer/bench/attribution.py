"""What of the difference between two configurations of one type each field makes.

The fields in which they differ are changed one after the other, from the first configuration to the second, and once
more in the opposite order. What a field contributes is the step that it makes, a mean over paired seeds; where the two
orders do not agree on it, it depends on which of the others are there: an interaction. Fields that mean nothing legal
without each other make one step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.messages import ConfigError
from configs.validate import validate
from trainer.bench.runs import DECIDED, Subject
from trainer.bench.statistics import Interval, corrected_level, paired_interval, told_apart
from trainer.sweep.jobs import MACHINE

__all__ = ["Path", "contributions", "differing", "path_between"]

# What changes no score: how sizes were found, as the other fields have them; and what is shown or saved.
_NO_STEP = {
    *DECIDED,
    *MACHINE,
    "preset",
    "match",
    "budget",
    "logging_steps",
    "sample_tokens",
    "sample_prompt",
    "env",
}
_NO_STEP |= {"save_checkpoint", "save_minutes", "save_steps", "save_total_limit"}
_NO_STEP |= {"wandb_run_name", "wandb_project", "use_wandb", "use_tensorboard"}


def differing(first: Subject, second: Subject) -> dict[str, tuple[Any, Any]]:
    """Field -> (first's value, second's), in the order of the configuration; those of `model_cfg` by `model_cfg.NAME`.

    Raises ConfigError where the types differ, or nothing does.
    """
    if first.cfg.type != second.cfg.type:
        raise ConfigError(
            f"command line: the two are of different types, {first.cfg.type} and {second.cfg.type}. A path leads from "
            "field to field of one; the leaderboard compares types"
        )
    one, two = _flat(first), _flat(second)
    found = {name: (one[name], two[name]) for name in one if name in two and one[name] != two[name]}
    if not found:
        raise ConfigError("command line: the two configurations are the same run")
    return found


def _flat(subject: Subject) -> dict[str, Any]:
    values = subject.cfg.model_dump(mode="json")
    fields = values.pop("model_cfg")
    return {name: value for name, value in values.items() if name not in _NO_STEP} | {
        f"model_cfg.{name}": value for name, value in fields.items()
    }


@dataclass(frozen=True)
class Path:
    """Steps from one configuration to another: `steps`, the fields of each, and the configuration with some of them
    taken, by their numbers from 0."""

    steps: list[list[str]]
    points: Mapping[frozenset[int], Subject]

    @property
    def forward(self) -> list[frozenset[int]]:
        """Points from the first configuration to the second."""
        return [frozenset(range(n)) for n in range(len(self.steps) + 1)]

    @property
    def backward(self) -> list[frozenset[int]]:
        """The same where the last step is taken first."""
        k = len(self.steps)
        return [frozenset(range(k - n, k)) for n in range(k + 1)]


def path_between(first: Subject, second: Subject) -> Path:
    """Every point of it is checked. Fields that are refused without each other are taken in one step."""
    fields = differing(first, second)
    steps = [[name] for name in fields]

    @functools.cache
    def point(names: frozenset[str]) -> Subject | None:
        return _with(first, second, {name: fields[name][1] for name in names})

    while (refused := _first_refused(steps, point)) is not None:
        steps[refused : refused + 2] = [steps[refused] + steps[refused + 1]]
    path = Path(steps, {})
    points = {
        chosen: point(frozenset(name for n in chosen for name in steps[n]))
        for chosen in {*path.forward, *path.backward}
    }
    return Path(steps, {chosen: subject for chosen, subject in points.items() if subject is not None})


def _first_refused(steps: Sequence[Sequence[str]], point: Any) -> int | None:
    """The number of a step that has to be taken together with the next; None where every point is legal."""
    for n in range(1, len(steps)):
        before = frozenset(name for step in steps[:n] for name in step)
        behind = frozenset(name for step in steps[n:] for name in step)
        if point(before) is None or point(behind) is None:
            return n - 1
    return None


def _with(first: Subject, second: Subject, changes: Mapping[str, Any]) -> Subject | None:
    """The first configuration with these fields; None where that is refused."""
    tree = first.cfg.model_dump(mode="json")
    for name, value in changes.items():
        if name.startswith("model_cfg."):
            tree["model_cfg"][name.removeprefix("model_cfg.")] = value
        else:
            tree[name] = value
    try:
        cfg, model_cfg = validate(tree)
    except ConfigError:
        return None
    return Subject(", ".join(changes) or first.label, cfg, model_cfg, f"{first.origin}, {second.origin}", ())


def contributions(
    path: Path, scores: Mapping[frozenset[int], Mapping[int, float]]
) -> tuple[list[dict[str, Any]], Interval | None, float]:
    """Of each step, in bits per byte: `forward` and `backward`, what it changes in either order, and `interaction`, the
    second less the first; None where its runs share no seed. Then the whole difference, and the level of the intervals,
    which holds for all of them together. `scores`: bits per byte by seed, of each point."""
    rows: list[dict[str, Any]] = []
    for n, step in enumerate(path.steps):
        ahead = (frozenset(range(n)), frozenset(range(n + 1)))
        back = (frozenset(range(n + 1, len(path.steps))), frozenset(range(n, len(path.steps))))
        forward, backward = (_differences(scores[before], scores[after]) for before, after in (ahead, back))
        shared = forward.keys() & backward.keys()
        rows.append(
            {
                "fields": step,
                "forward": _interval(forward.values()),
                "backward": _interval(backward.values()),
                "interaction": _interval([backward[seed] - forward[seed] for seed in sorted(shared)]),
                "on_top_of": {
                    name: [field for m in sorted(before) for field in path.steps[m]]
                    for name, (before, _) in (("forward", ahead), ("backward", back))
                },
            }
        )
    kinds = ("forward", "backward", "interaction") if len(path.steps) > 1 else ("forward",)
    places = [(row, kind) for row in rows for kind in kinds if row[kind] is not None]
    every = [row[kind] for row, kind in places]
    level = corrected_level(every)
    for (row, kind), found in zip(places, told_apart(every), strict=True):
        row[kind] = row[kind].at(level)
        row.setdefault("told_apart", {})[kind] = found
    whole = _differences(scores[path.forward[0]], scores[path.forward[-1]])
    return rows, _interval(whole.values()), level


def _differences(before: Mapping[int, float], after: Mapping[int, float]) -> dict[int, float]:
    return {seed: after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())}


def _interval(values: Any) -> Interval | None:
    found = list(values)
    return paired_interval(found) if found else None
