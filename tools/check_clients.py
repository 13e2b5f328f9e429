"""Runs the real code of trainers against star_kernels.integrations on a CPU.

In ``python -m tools.check_clients --verl-omni DIR``, DIR is a checkout of the trainer; nothing of it is part of this
project. Each line is one check with its outcome; the exit status is 1 if one has failed. tools/clients has a module for
each trainer, with what it needs to be installed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# Option -> module with check(folder) -> Iterator[Finding]. Imported when needed: each needs its trainer's packages.
CLIENTS = {
    "verl-omni": "tools.clients.verl_omni",
    "flow-grpo": "tools.clients.flow_grpo",
    "unirl": "tools.clients.unirl",
    "flow-factory": "tools.clients.flow_factory",
}


def main(arguments: list[str] | None = None) -> int:
    """Prints the findings of the given checkouts; returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in CLIENTS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    parser.add_argument("--failures", action="store_true", help="print only checks that fail")
    given = vars(parser.parse_args(arguments))
    folders = {name: given[name.replace("-", "_")] for name in CLIENTS}
    if not any(folders.values()):
        parser.error(f"one of {', '.join(f'--{name}' for name in CLIENTS)} must be given")
    failed = total = 0
    for name, folder in folders.items():
        if folder is None:
            continue
        for finding in importlib.import_module(CLIENTS[name]).check(folder.resolve()):
            total, failed = total + 1, failed + (not finding.passed)
            if not (finding.passed and given["failures"]):
                outcome = "ok    " if finding.passed else "FAILED"
                print(f"{outcome} {name}: {finding.name}" + (f" ({finding.figure})" if finding.figure else ""))
    print(f"{total - failed} of {total} checks passed")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
