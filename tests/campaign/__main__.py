"""What strangers' files and accidents may do to it: `python -m tests.campaign kills --minutes 10 --seed 7`

A campaign makes as many cases as asked, or as there is time for, each from (seed, number) alone, so that what one finds
can be tried again by `--case`. Its figures are JSON; those of further seeds add up in the same file.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from naming import load
from tests.campaign.figures import Figures, Found
from tests.campaign.jail import Campaign, run

# Name -> "module:object", a `Campaign`. A further one is a file and a row.
CAMPAIGNS = {
    "configs": "tests.campaign.configs:CAMPAIGN",  # every loader, up to where a run would start
    "kills": "tests.campaign.kills:CAMPAIGN",  # runs that are killed, stopped, or whose disk fails
    "folders": "tests.campaign.folders:CAMPAIGN",  # run folders that are damaged or forged
    "commands": "tests.campaign.commands:CAMPAIGN",  # whole command lines of every command
}
MOST = 1 << 31  # cases, where only time ends a campaign


def main(argv: list[str]) -> int:
    """The exit status is 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("campaign", choices=[*CAMPAIGNS])
    parser.add_argument("--cases", type=int, help="500 where no minutes are given")
    parser.add_argument("--minutes", type=float, help="begin no case after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, help="figures, to which these are added")
    parser.add_argument("--case", type=int, help="show one case, and what comes of it")
    parser.add_argument(
        "--keep", type=Path, help="a new folder, for the folders of the cases, which are kept"
    )
    args = parser.parse_args(argv)
    campaign: Campaign = load(CAMPAIGNS[args.campaign])
    end = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    cases = args.cases if args.cases is not None else 500 if args.minutes is None else MOST
    first, cases = (args.first, cases) if args.case is None else (args.case, 1)
    figures = Figures.read(args.json, args.campaign)
    bad, written = 0, -math.inf
    with _folder(args.keep) as folder:
        numbers = range(first, first + cases)
        keep = args.keep is not None
        for found in run(campaign, args.seed, numbers, folder, args.workers, end=end, keep=keep):
            figures.add(args.seed, found)
            bad += found.outcome not in campaign.good
            if args.case is not None:
                print(campaign.shown(args.seed, args.case))
            if found.outcome not in campaign.good or args.case is not None:
                print(_line(args.campaign, args.seed, found), flush=True)
            if args.json and time.monotonic() > written + 10:  # what is stopped has most of them
                figures.write(args.json)
                written = time.monotonic()
    if args.json:
        figures.write(args.json)
    print(figures.table(campaign.good))
    return 1 if bad else 0


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="campaign-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    else:
        kept.mkdir(parents=True)
        yield kept.resolve()


def _line(campaign: str, seed: int, found: Found) -> str:
    return f"{campaign} --seed {seed} --case {found.case}: {found.kind}: {found.outcome}: {found.detail}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
