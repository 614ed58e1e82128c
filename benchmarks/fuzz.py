"""Mutated input for every reader of files that someone else may have written.

    python benchmarks/fuzz.py [TARGET ...] [--inputs N] [--seed TEXT] [--json FILE] [--outcomes]

Each reader runs in a process of its own with a limit on time and memory. Prints a table, and for every finding the
smallest input that shows it; exit code 1 if there are any. The same seed gives the same inputs. The readers are in
tests/fuzz/targets.py; docs/hostile-input.md has the limits and a run of 200,000 inputs each.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

from tests.fuzz.run import Report, as_data, fuzz_apart  # noqa: E402 - from the folder above
from tests.fuzz.targets import TARGETS  # noqa: E402

COLUMNS = ("inputs", "a second", "slowest", "read", "refused", "outcomes", "findings")


def row(report: Report) -> str:
    """One line of the table."""
    rate = report.inputs / report.seconds if report.seconds else 0
    read, outcomes, findings = report.read, len(report.outcomes), len(report.findings)
    slowest = f"{report.slowest_seconds:.3f} s"
    numbers = f"{read:10,}{report.refused:10,}{outcomes:10,}{findings:10,}"
    return f"{report.target:22}{report.inputs:10,}{rate:10,.0f}{slowest:>10}{numbers}"


def main() -> None:
    """Run the targets that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of: {', '.join(TARGETS)}")
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--json", type=Path, help="also write the reports to a file")
    parser.add_argument("--outcomes", action="store_true", help="list how inputs ended")
    args = parser.parse_args()
    unknown = set(args.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    reports = []
    print(f"{'reader':22}" + "".join(f"{name:>10}" for name in COLUMNS), flush=True)
    for name in args.targets or TARGETS:
        reports.append(fuzz_apart(name, args.inputs, args.seed))
        print(row(reports[-1]), flush=True)
        for finding in reports[-1].findings:
            print(f"  {finding.times:,} x {finding.what}\n    {finding.data!r}", flush=True)
        if args.outcomes:
            for outcome, times in sorted(reports[-1].outcomes.items(), key=lambda item: -item[1]):
                print(f"  {times:8,} {outcome}")
    if args.json:
        args.json.write_text(json.dumps([as_data(report) for report in reports], indent=2) + "\n")
    sys.exit(any(report.findings for report in reports))


if __name__ == "__main__":
    main()
