"""What strangers' files and accidents may do to it: `python -m tests.campaign configs --cases 2000 --seed 7`

A campaign makes as many cases as asked, each from (seed, number) alone, so that what one finds can be tried again by
`--case`. Its figures are JSON; those of further seeds add up in the same file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from naming import load
from tests.campaign.figures import Figures, Found
from tests.campaign.jail import Campaign, run

# Name -> "module:object", a `Campaign`. A further one is a file and a row.
CAMPAIGNS = {"configs": "tests.campaign.configs:CAMPAIGN"}


def main(argv: list[str]) -> int:
    """The exit status is 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("campaign", choices=[*CAMPAIGNS])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, help="figures, to which these are added")
    parser.add_argument("--case", type=int, help="show one case, and what comes of it")
    args = parser.parse_args(argv)
    campaign: Campaign = load(CAMPAIGNS[args.campaign])
    numbers = (
        range(args.first, args.first + args.cases) if args.case is None else range(args.case, args.case + 1)
    )
    figures = Figures.read(args.json, args.campaign)
    with tempfile.TemporaryDirectory() as folder:
        for found in run(campaign, args.seed, numbers, Path(folder), args.workers):
            figures.add(args.seed, found)
            if args.case is not None:
                print(campaign.shown(args.seed, args.case))
            if found.outcome not in campaign.good or args.case is not None:
                print(_line(args.seed, found), flush=True)
    if args.json:
        figures.write(args.json)
    print(figures.table(campaign.good))
    return 1 if figures.bad(campaign.good) else 0


def _line(seed: int, found: Found) -> str:
    return f"--seed {seed} --case {found.case}: {found.kind}: {found.outcome}: {found.detail}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
