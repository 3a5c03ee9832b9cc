"""Replay one order of two jobs that a crash test complained of; the test prints the whole command:

python tests/crash/replay_writers.py NAME PLACE ORDER
"""

from __future__ import annotations

import argparse
import sys

from runs import repeatable
from writers import PLACES, Duel, Order, check, rivals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=rivals())
    parser.add_argument("place", choices=PLACES)
    parser.add_argument("order", type=Order.of)
    told = parser.parse_args()
    pair = rivals()[told.name]
    with repeatable():
        base = pair.scenario.prepare(PLACES[told.place]())
        duel = Duel(pair.jobs, base.copy(), told.order)
        duel.run()
        for index, (results, log) in enumerate(zip(duel.results, duel.logs, strict=True)):
            done = "\n  ".join(map(str, log.ops))
            sys.stdout.write(f"job {index}: {results}\n  {done}\n")
        check(pair, base, told.order)
    sys.stdout.write("everything holds\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
