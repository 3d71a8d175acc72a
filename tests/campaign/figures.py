"""What came of the cases of a campaign, as JSON to which further runs add."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """What came of one case. `kind` is what was tried, `detail` what was seen, "" where nothing is to be said; `counts`
    what else is counted of it, such as the kills of a run."""

    case: int
    kind: str
    outcome: str
    detail: str = ""
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Figures:
    """Outcomes of the cases of each seed. A case that is run again counts once, as it came out last."""

    campaign: str
    seeds: dict[int, dict[int, Found]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, campaign: str) -> Figures:
        """Those of a file, none where there is no file. ValueError for those of another campaign."""
        if path is None or not path.exists():
            return cls(campaign)
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["campaign"] != campaign:
            raise ValueError(f"{path} holds figures of {stored['campaign']}, not of {campaign}")
        cases = {int(s): {c["case"]: Found(**c) for c in found} for s, found in stored["seeds"].items()}
        return cls(campaign, cases)

    def add(self, seed: int, found: Found) -> None:
        self.seeds.setdefault(seed, {})[found.case] = found

    def write(self, path: Path) -> None:
        seeds = {seed: [asdict(found) for found in cases.values()] for seed, cases in self.seeds.items()}
        stored = {
            "campaign": self.campaign,
            "outcomes": self.outcomes(),
            "counts": self.counts(),
            "seeds": seeds,
        }
        path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")

    def outcomes(self) -> dict[str, dict[str, int]]:
        """kind -> outcome -> cases"""
        counts: dict[str, Counter[str]] = {}
        for found in self._all():
            counts.setdefault(found.kind, Counter())[found.outcome] += 1
        return {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)}

    def counts(self) -> dict[str, int]:
        """What is counted beside outcomes, added up."""
        total: Counter[str] = Counter()
        for found in self._all():
            total.update(found.counts)
        return dict(sorted(total.items()))

    def bad(self, good: Container[str]) -> list[Found]:
        return [found for found in self._all() if found.outcome not in good]

    def table(self, good: Container[str]) -> str:
        lines = [
            f"{kind}: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
            for kind, counts in self.outcomes().items()
        ]
        lines += [f"{what}: {n}" for what, n in self.counts().items()]
        total = sum(len(cases) for cases in self.seeds.values())
        return "\n".join(
            [*lines, f"{total} cases of {len(self.seeds)} seeds, {len(self.bad(good))} of them bad"]
        )

    def _all(self) -> list[Found]:
        return [found for cases in self.seeds.values() for found in cases.values()]
