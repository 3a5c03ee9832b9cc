"""Coverage-guided fuzzing of one reader; what it finds to be new is kept, and the tests replay it.

    pip install atheris
    python tests/hostile/fuzz.py manifest --minutes 60 --corpus tests/hostile/corpus/manifest

Targets: manifest, values, safetensors, pickles, torch, dcp. An input that breaks a reader's contract ends the run and
is written to crash-...; replay it with `python tests/hostile/fuzz.py TARGET --replay FILE`.
`--minimize` keeps of a corpus only what adds coverage.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

LARGEST_BYTES = 4096
_ODD = (
    None,
    True,
    -1,
    0,
    1,
    2**62,
    2**70,
    1.5,
    "",
    "x",
    "nan",
    "F32",
    "../x",
    [],
    {},
    [[]],
    {"$tensor": "t"},
    "0" * 32,
)


def mutated_json(data: bytes, most_bytes: int, seed: int) -> bytes:
    """Return JSON with a part replaced, dropped, doubled or moved; what is no JSON is changed as bytes."""
    import atheris

    rng = random.Random(seed)
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    holders = [node for node in nodes(body) if node]
    if not holders or rng.random() < 0.2:
        return bytes(atheris.Mutate(data, most_bytes))
    for _ in range(rng.randint(1, 3)):
        holder = rng.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        key = rng.choice(keys)
        match rng.randrange(5):
            case 0:
                holder[key] = rng.choice(_ODD)
            case 1:
                holder[key] = copy.deepcopy(rng.choice(holders))
            case 2:
                del holder[key]
            case 3 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case _:
                if type(holder[key]) is int:
                    holder[key] += rng.choice([-1, 1, 8, -(2**31), 2**31])
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return text if len(text) <= most_bytes else data


def mutated_safetensors(data: bytes, most_bytes: int, seed: int) -> bytes:
    """Return a safetensors file whose header says something else; its reader is native code, and guides nobody."""
    import fuzz_targets

    rng = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8 or data[8:9] != b"{":
        data = rng.choice(fuzz_targets.seeds("safetensors"))
        length = int.from_bytes(data[:8], "little")
    header = mutated_json(data[8 : 8 + length], most_bytes, seed)
    payload = data[8 + length :]
    match rng.randrange(4):
        case 0:
            payload = payload[: rng.randint(0, len(payload))]
        case 1:
            payload += bytes(rng.randint(1, 64))
    length = (
        len(header) if rng.random() < 0.8 else rng.choice([0, 1, len(header) - 1, len(header) + 1, 2**31, 2**64 - 1])
    )
    text = length.to_bytes(8, "little") + header + payload
    return text if len(text) <= most_bytes else data


def nodes(node: Any) -> Iterator[Any]:
    """Yield every list and dict in JSON."""
    if isinstance(node, (dict, list)):
        yield node
        for item in list(node.values()) if isinstance(node, dict) else list(node):
            yield from nodes(item)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=["manifest", "values", "safetensors", "pickles", "torch", "dcp"])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long, in minutes")
    parser.add_argument("--corpus", type=Path, help="folder of inputs, read and added to")
    parser.add_argument("--replay", type=Path, help="one input to run, instead")
    parser.add_argument("--minimize", action="store_true", help="drop what adds no coverage, instead")
    options, of_libfuzzer = parser.parse_known_args()  # it starts this script again, with options of its own
    is_inner = any(option.startswith("-merge_inner") for option in of_libfuzzer)
    if of_libfuzzer and not is_inner:
        parser.error(f"unknown: {' '.join(of_libfuzzer)}")
    if options.replay:
        from fuzz_targets import TARGETS

        TARGETS[options.target](options.replay.read_bytes())
        return
    try:
        import atheris
    except ImportError:
        sys.exit("fuzzing needs the package 'atheris'\nFix: pip install atheris")
    import torch
    import torch.distributed.checkpoint  # noqa: F401

    # What is instrumented guides the search.
    with atheris.instrument_imports(include=["distckpt"]):
        import fuzz_targets
    corpus = options.corpus or Path(__file__).parent / "corpus" / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    if not is_inner:
        for number, seed in enumerate(fuzz_targets.seeds(options.target)):
            (corpus / f"seed-{number:02d}").write_bytes(seed)
    limits = [f"-max_len={LARGEST_BYTES}", "-rss_limit_mb=4096", "-timeout=20", "-print_final_stats=1"]
    if is_inner:
        limits, arguments = [], of_libfuzzer
    elif options.minimize:
        smaller = corpus.with_name(f"{corpus.name}-minimized")
        smaller.mkdir(exist_ok=True)
        arguments = ["-merge=1", str(smaller), str(corpus)]
    else:
        arguments = [f"-max_total_time={int(options.minutes * 60)}", str(corpus)]
    mutator = {"manifest": mutated_json, "values": mutated_json, "safetensors": mutated_safetensors}.get(options.target)
    mutators = {} if mutator is None else {"custom_mutator": mutator}
    command = f"{sys.executable} {Path(__file__).resolve()} {options.target}"
    atheris.Setup([command, *limits, *arguments], fuzz_targets.TARGETS[options.target], **mutators)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
