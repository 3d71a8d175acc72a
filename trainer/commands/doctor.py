"""The `doctor` command: what is here, what works, and what to do about what does not."""

from __future__ import annotations

import argparse
import json

from trainer.doctor import SECTIONS, SELF_TEST
from trainer.doctor.lines import Line, lines_of

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """`python mytrainer.py doctor`; the exit status is 1 where the self-test fails."""
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py doctor",
        description="Look at this installation and this machine: versions, devices, kernels, storage, and a self-test "
        "of less than a minute. Every problem comes with what to do about it. The exit status is 1 if the self-test "
        "fails.",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, with a list for each section"
    )
    args = parser.parse_args(argv)
    found: dict[str, list[Line]] = {}
    for section, where in SECTIONS.items():
        if not args.json:
            print(section, flush=True)
        found[section] = []
        for line in lines_of(section, where):
            found[section].append(line)
            if not args.json:
                print(shown(line), flush=True)
        if not args.json:
            print()
    problems = [line for lines in found.values() for line in lines if line.state == "problem"]
    passed = not any(line.state == "problem" for line in found[SELF_TEST])
    if args.json:
        sections = {section: [line.as_dict() for line in lines] for section, lines in found.items()}
        print(json.dumps({"self_test_passed": passed, "problems": len(problems), **sections}, indent=2))
    else:
        print(_conclusion(len(problems), passed))
    return 0 if passed else 1


def shown(line: Line) -> str:
    remedy = f"\n{'':11}-> {line.remedy}" if line.remedy else ""
    return f"  {line.state:<8} {line.about}: {line.text}{remedy}"


def _conclusion(problems: int, passed: bool) -> str:
    test = "the self-test passed" if passed else "the self-test FAILED"
    if not problems:
        return f"{test}; no problems"
    return f"{test}; {problems} problem{'s' if problems > 1 else ''}, each with what to do (->)"
