"""``levin report RUN...``: the page of runs that are on the disk."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from levin.report.page import make_page, short_names, write_page
from levin.report.read import PAGE, find_runs, read_run


def main(arguments: Sequence[str]) -> int:
    """Write the page of the runs in the folders given; the status is 1 where there is none. This is ``levin report``."""
    parser = argparse.ArgumentParser(
        prog="levin report",
        description="Write one HTML page about runs of CSVLogger and TensorBoardLogger, levin's or Lightning's: "
        "their curves over each other, what ran, and what differs. It needs no network and no server.",
        epilog="Examples: levin report lightning_logs/version_3\n          levin report lightning_logs -o runs.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of several")
    parser.add_argument(
        "-o", "--output", help=f"the page; by default {PAGE} in the folder of the run, or here for several"
    )
    options = parser.parse_args(arguments)
    try:
        folders = list(dict.fromkeys(folder for path in options.runs for folder in find_runs(path)))
        runs = [read_run(folder) for folder in folders]
        title = short_names(folders)[0] if len(runs) == 1 else f"{len(runs)} runs"
        default = folders[0] / PAGE if len(runs) == 1 else Path(PAGE)
        path = default if options.output is None else Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, make_page(runs, title))
    except (OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"levin report: {error}\n")
        return 1
    print(path)
    return 0
