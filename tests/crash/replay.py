"""Replay one state that a crash test complained of; the test prints the whole command:

python tests/crash/replay.py SCENARIO MODEL --layout LAYOUT --first RANK --seed SEED --limit LIMIT --state NUMBER
"""

from __future__ import annotations

import argparse
import random
import sys

from crashes import MODELS, SAMPLE_LIMIT, Counts, check, check_nested, explained, scenarios, survivors
from runs import repeatable


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=[scenario.name for scenario in scenarios()])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layout", choices=["sharded", "full"], default="sharded")
    parser.add_argument("--first", type=int, default=0, help="the rank that is ahead")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--limit", type=int, default=SAMPLE_LIMIT, help="states of a power loss, about")
    parser.add_argument("--state", type=int, required=True)
    told = parser.parse_args()
    [scenario] = [s for s in scenarios(told.layout, first=told.first) if s.name == told.scenario]
    with repeatable():
        states = survivors(scenario, told.model, seed=told.seed, limit=told.limit, counts=Counts())
        [survivor] = [state for state in states if state.number == told.state]
        try:
            check(survivor, scenario)
            check_nested(survivor, scenario, told.model, random.Random(told.seed), num_states=10_000)
        except AssertionError as error:
            sys.stdout.write(explained(survivor, scenario, told.model, told.seed, told.limit, error) + "\n")
            raise
    sys.stdout.write("everything holds\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
