"""Compare this Emu with a folder of recorded reference numbers.

    python tools/check_golden.py FOLDER

Covered are the forward pass, losses and gradients, image rollouts, written text, ranking, the
instruct model with its adapters beside and inside its weights, storyboards, and the way of both
releases to full tensors and back. Prints a table (quantity, error, limit, verdict) and exits 1 if
any quantity is outside its limit.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

from mmtrain.convert.golden import round_trips
from mmtrain.errors import MmtrainError
from mmtrain.models.emu.golden import Comparison, Golden
from mmtrain.models.emu.golden_checks import every_check


def line(found: Comparison) -> str:
    """One row of the table."""
    verdict = "ok" if found.passed else "FAIL"
    return f"{found.quantity:<84} {found.error:>9.1e} {found.limit:>9.1e}  {verdict}"


def main() -> int:
    """Check the folder of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="golden folder (config.json, weights, io, ...)")
    folder: Path = parser.parse_args().folder
    print(f"{'quantity':<84} {'error':>9} {'limit':>9}  verdict")
    checked = failed = 0
    try:
        for found in chain(every_check(Golden(folder)), round_trips(folder)):
            print(line(found), flush=True)
            checked += 1
            failed += not found.passed
    except MmtrainError as fault:
        print(f"check_golden: {fault}", file=sys.stderr)
        return int(fault.exit_code)
    print(f"{checked} quantities, {failed} outside their limit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
