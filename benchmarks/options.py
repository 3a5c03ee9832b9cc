"""What every benchmark can be told, and the frame in which it runs."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import states
from benchmarks.machine import file_system
from benchmarks.rounds import Rules
from benchmarks.states import Device, Size, State
from benchmarks.team import Backend, Team, is_rank_of_a_team, relaunch

RESULTS = Path(__file__).parent / "results"
MAX_S = 400.0
BUILD = Path(__file__).parents[1] / "build"  # git ignores it


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a benchmark was told.

    Attributes:
        size: How large the states are.
        states: Which states.
        rules: How many rounds, and how still the machine has to be.
        directory: Where it writes; new, and deleted at the end.
        results: Where the JSON lines go.
        only: The only contenders; None is all.
        profile: Whether to show where the time goes, too.
        device: Where the states lie.
        backend: What the training's process group speaks.
    """

    size: Size
    states: tuple[str, ...]
    rules: Rules
    directory: Path
    results: Path
    only: list[str] | None
    profile: bool
    device: Device = "cpu"
    backend: Backend = "gloo"

    def make(self, name: str) -> State:
        """Return a state of the size that was asked for, where it was asked for."""
        return states.make(name, self.size, device=self.device, parallel=self.backend == "nccl")


def parse(arguments: Sequence[str], *, about: str, ranks: Sequence[int]) -> argparse.Namespace:
    """Return a benchmark's arguments."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--size", choices=["tiny", "moderate", "full"], default="moderate", help="of the states")
    parser.add_argument("--states", nargs="+", choices=states.FULL, help="by default, those of the size")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(ranks), help="numbers of ranks, one after another")
    parser.add_argument("--rounds", type=int, default=5, help="good rounds; up to twice as many are run")
    parser.add_argument("--max-seconds", type=float, default=MAX_S, help="of a state: no round begins after")
    parser.add_argument("--max-noise", type=float, default=0.25, help="how far a reference may stray in a good round")
    parser.add_argument("--seed", type=int, default=0, help="what the orders of the rounds are drawn from")
    parser.add_argument("--directory", type=Path, default=BUILD, help="on the disk that is to be measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON lines go")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="leave the others out")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the states lie")
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo", help="of the training's process group")
    parser.add_argument("--profile", action="store_true", help="also show where the time goes, if the benchmark can")
    return parser.parse_args(arguments)


def run(
    measure: Callable[[Options, Team], None],
    *,
    module: str,
    about: str,
    ranks: Sequence[int] = (1,),
    defaults: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
    moderate: Sequence[str] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a benchmark on each number of ranks that was asked for.

    Args:
        measure: Measures and reports; called on every rank.
        module: The benchmark's module, to start on several ranks.
        about: What it measures.
        ranks: The numbers of ranks by default.
        defaults: The states that it measures if it is told none; by default, those of the size.
        leave_out: The states of the size that it does not measure unless told.
        moderate: Those that it measures at tiny and moderate size, if they are others than everybody's.
        arguments: The command line; by default, the process's own.

    Returns:
        An exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse(given, about=about, ranks=ranks)
    names = states.FULL if parsed.size == "full" else (moderate or states.MODERATE)
    chosen = tuple(parsed.states or defaults or [name for name in names if name not in leave_out])
    if not is_rank_of_a_team() and parsed.ranks != [1]:
        status = 0
        for num_ranks in parsed.ranks:
            # A process of its own for each: what one leaves behind, no other meets.
            status |= relaunch(module, given, num_ranks=num_ranks)
        return status
    warnings.filterwarnings("ignore")  # of peers; they would hide the tables
    team = Team(parsed.backend)
    parsed.directory.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(prefix="bench-", dir=parsed.directory) if team.rank == 0 else ""
    directory = Path(team.agree(made))
    options = Options(
        size=parsed.size,
        states=chosen,
        rules=Rules(num_rounds=parsed.rounds, max_noise=parsed.max_noise, seed=parsed.seed, limit_s=parsed.max_seconds),
        directory=directory,
        results=parsed.results,
        only=parsed.only,
        profile=parsed.profile,
        device=parsed.device,
        backend=parsed.backend,
    )
    try:
        measure(options, team)
        team.barrier()
    finally:
        with suppress(OSError):
            if team.rank == 0:
                shutil.rmtree(directory)
    team.close()
    return 0


def facts_of(state: State, options: Options, team: Team) -> dict[str, object]:
    """Return what a report says of what was measured, and where."""
    return {
        "state": state.name,
        "size": options.size,
        "bytes": state.num_bytes,
        "ranks": team.world_size,
        "device": options.device,
        "backend": options.backend,
        "file_system": file_system(options.directory),
    }
