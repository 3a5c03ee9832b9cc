"""Everything that is worth measuring on a GPU, one part after another, in under ten minutes; `gpu.sh` starts it.

    benchmarks/gpu.sh
    python -m benchmarks.gpu --device cpu --size tiny

Each part is a process with a time limit of its own; one that fails or is cut off is said to be, and the next begins.
The JSON lines and `summary.md` stand in `results/gpu/`, what each part printed in its folder `logs/`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.options import BUILD, RESULTS
from benchmarks.summary import Line, described, markdown, newest, read

ROOT = Path(__file__).parents[1]
ALL_S = 560.0  # of ten minutes; the rest is for starting and for the summary
GRACE_S = 5.0
STALLS = ("distckpt", "distckpt, no overlap", "distckpt, prewarmed", "raw copy and direct write")
DCP = ("DCP async", "DCP async, kept stager, plan cache, threads")
SAVERS = ("distckpt", "torch.save", "safetensors", "DCP", "DCP, plan cache and threads", "Lightning Fabric")
# An older pytest than the one that is pinned will do, and warnings of other versions are no failures here.
PYTEST = ("-q", "-m", "gpu", "-o", "minversion=7", "-W", "default", "-p", "no:cacheprovider")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the run.

    Attributes:
        name: Its name.
        arguments: What Python is started with.
        limit_s: When it is cut off, in seconds from its start.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a part: its name, a word, and how long it took in seconds."""

    part: str
    word: str
    seconds: float


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description="everything that is worth measuring on a GPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only tries the parts out")
    parser.add_argument("--size", choices=["tiny", "moderate"], default="moderate", help="of the states")
    parser.add_argument("--directory", type=Path, default=BUILD, help="on the disk that is to be measured")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu", help="where the results go")
    parser.add_argument("--seconds", type=float, default=ALL_S, help="for all parts together")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    return parser.parse_args(arguments)


def plan(given: argparse.Namespace) -> list[Part]:
    """Return the parts in their order; what matters most comes first.

    Raises:
        ValueError: A part was asked for that there is not.
    """
    common = ["--device", given.device, "--size", given.size]
    common += ["--directory", str(given.directory), "--results", str(given.results)]
    tiny = given.size == "tiny"

    def part(name: str, module: str, limit_s: float, *arguments: str, rounds: int, rounds_s: float = 60.0) -> Part:
        # Rounds end in time for a report; the limit is there for what hangs.
        limits = ("--rounds", str(1 if tiny else rounds), "--max-seconds", f"{rounds_s:.0f}")
        started = ("-m", f"benchmarks.{module}", *common, *limits, *arguments)
        return Part(name=name, arguments=started, limit_s=limit_s)

    # NCCL needs a GPU of its own for each rank: here it has one rank. gloo's ranks share the GPU.
    nccl = ("--backend", "nccl") if given.device == "cuda" else ()
    resnet, gpt = ("--states", "resnet50", "--ranks", "1"), ("--states", "gpt2-medium", "--ranks", "1")
    several = ("--states", "resnet50", "--ranks", "2", "4")
    by_hand = ("torch.save of a clone, on a thread", "Lightning AsyncCheckpointIO")
    parts = [
        part("limits", "gpu_limits", 40, rounds=5, rounds_s=15),
        part("stall", "async_stall", 100, *resnet, "--only", *STALLS, *DCP, *by_hand, rounds=5, rounds_s=45),
        part("stall-4-gb", "async_stall", 120, *gpt, "--only", *STALLS, DCP[1], rounds=3, rounds_s=60),
        part("save", "local_save", 50, *resnet, "--only", *SAVERS, rounds=5, rounds_s=20),
        part("load", "load", 90, *resnet, "--only", *SAVERS, rounds=5, rounds_s=20),
        part("nccl", "async_stall", 50, *resnet, *nccl, "--only", "distckpt", DCP[1], rounds=3, rounds_s=20),
        part("bytes", "ddp_bytes", 80, *several, "--only", "distckpt", "DCP", "DCP async", rounds=1),
        Part(name="tests", arguments=("-m", "pytest", *PYTEST, *gpu_tests()), limit_s=120),
    ]
    unknown = set(given.parts or ()) - {each.name for each in parts}
    if unknown:
        raise ValueError(f"no part {min(unknown)!r}; there are {', '.join(each.name for each in parts)}")
    return [each for each in parts if given.parts is None or each.name in given.parts]


def gpu_tests() -> list[str]:
    """Return the test modules that need a GPU; the others may need packages that are not here."""
    modules = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(module.relative_to(ROOT)) for module in modules if "mark.gpu" in module.read_text()]


def run(part: Part, *, log: Path, limit_s: float) -> Outcome:
    """Run a part in processes of its own, and say what became of it; its whole output goes to a log."""
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *part.arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait(timeout=limit_s)
            word = "done" if status == 0 else f"FAILED with status {status}, see {log.name}"
        except subprocess.TimeoutExpired:
            word = f"CUT OFF after {limit_s:.0f} s, see {log.name}"
        finally:
            end(process)
    return Outcome(part=part.name, word=word, seconds=time.monotonic() - begun)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, unless it has ended by itself."""
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        started = [first, *first.children(recursive=True)]
        for each in started:
            with suppress(psutil.NoSuchProcess):
                each.terminate()
        for each in psutil.wait_procs(started, timeout=GRACE_S)[1]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def summary(lines: Sequence[Line], outcomes: Sequence[Outcome]) -> str:
    """Return the run as Markdown: targets, every median, and what became of each part."""
    text = ["# Measured on a GPU", "", markdown(lines)]
    for line in lines:
        text += [f"## {line['benchmark']}: {line['about']}", "", f"{described(line)}; {line['verdict']}", ""]
        medians = [each for each in line["figures"] if "median" in each]
        text += ["| | measure | median | least | greatest |", "| --- | --- | --- | --- | --- |"] if medians else []
        for each in medians:
            values = " | ".join(f"{each[name]:.4g}" for name in ("median", "low", "high"))
            text.append(f"| {each['contender']} | {each['measure']} | {values} |")
        text += [f"- not run: {name}: {why}" for name, why in line["not_run"].items() if why != "not asked for"]
        text.append("")
    text += ["## Parts", "", *(f"- {each.part}: {each.word}, {each.seconds:.0f} s" for each in outcomes)]
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; return 1 if one of them failed or was cut off."""
    given = parse(arguments)
    if given.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no NVIDIA GPU here\nFix: python -m benchmarks.gpu --device cpu --size tiny", file=sys.stderr)
            return 2
    logs = given.results / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + given.seconds
    outcomes = []
    for part in plan(given):
        left_s = deadline - time.monotonic()
        if left_s < GRACE_S:
            outcomes.append(Outcome(part=part.name, word="NOT RUN, no time was left", seconds=0.0))
            continue
        outcomes.append(run(part, log=logs / f"{part.name}.log", limit_s=min(part.limit_s, left_s)))
        print(f"{part.name}: {outcomes[-1].word}, {outcomes[-1].seconds:.0f} s", flush=True)
    text = summary(newest(read(given.results)), outcomes)
    (given.results / "summary.md").write_text(text)
    print(text)
    return 0 if all(each.word == "done" for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
