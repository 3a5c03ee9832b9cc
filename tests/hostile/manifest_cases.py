"""Checkpoints made to harm: real ones, changed, and sealed again, so that only the checks stand in their way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distckpt.checksum import digest

Body = dict[str, Any]
# "refused": nothing is loaded from it. "same": refused, or what was saved comes back. "any": its plain values may be
# other ones, which nobody can tell; no harm, and no error that is not ours.
Verdict = Literal["refused", "same", "any"]

STEP = "step-000000000030"
OTHER = "step-000000000020"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A run's folder, fresh for one case, with the newest checkpoint's manifest as JSON."""

    root: Path
    body: Body

    @property
    def folder(self) -> Path:
        return self.root / STEP

    @property
    def data_file(self) -> Path:
        return self.folder / self.body["files"][0]["name"]

    def seal(self) -> None:
        """Write `body` as the manifest."""
        self.seal_text(json.dumps(self.body, sort_keys=True, separators=(",", ":")).encode())

    def seal_text(self, text: bytes) -> None:
        """Write JSON text, which ends in a brace, as the manifest, with the right digest."""
        (self.folder / "manifest.json").write_bytes(sealed(text))

    def rewrite(self, data: bytes) -> None:
        """Make `data` the data file, of one segment with the right digest."""
        self.data_file.write_bytes(data)
        self.body["files"][0].update(bytes=len(data), segments=[[len(data), digest(data)]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to spoil a checkpoint."""

    name: str
    spoil: Callable[[Ground], None]
    verdict: Verdict = "refused"


def sealed(text: bytes) -> bytes:
    text = text[:-1]
    return text + f',"xxh3":"{digest(text)}"}}\n'.encode()


def read_body(path: Path) -> Body:
    body: Body = json.loads(path.read_bytes())
    del body["xxh3"]
    return body


def put(body: Any, path: tuple[Any, ...], value: Any) -> None:
    for part in path[:-1]:
        body = body[part]
    body[path[-1]] = value


def changed(name: str, change: Callable[[Body], Any], verdict: Verdict = "refused") -> Case:
    """Return a case that changes the manifest alone."""

    def spoil(ground: Ground) -> None:
        change(ground.body)
        ground.seal()

    return Case(name=name, spoil=spoil, verdict=verdict)


def replaced(name: str, path: tuple[Any, ...], value: Any, verdict: Verdict = "refused") -> Case:
    return changed(name, lambda body: put(body, path, value), verdict)


_T = ("tensors", "table")
_CHUNK = (*_T, "chunks", 0)
_ODD: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "1.5": 1.5,
    "2**70": 2**70,
    "text": "x",
    "a list": [[]],
    "an object": {"a": {}},
}
# Where each odd value is put, and which of them say nothing wrong there.
_PLACES: dict[tuple[Any, ...], set[str]] = {
    ("format",): set(),
    ("step",): set(),
    ("attempt",): {"text"},
    ("run",): {"text"},
    ("layout",): set(),
    ("world_size",): set(),
    ("created",): {"true", "-1", "1.5", "2**70"},
    ("writer",): {"an object"},
    ("files",): set(),
    ("tensors",): set(),
    ("objects",): set(),
    ("metrics",): set(),
    ("versions",): {"an object"},
    ("timings",): {"an object"},
    ("parent",): {"null", "an object"},
    ("config",): {"null", "an object"},
    ("files", 0): set(),
    ("files", 0, "name"): set(),
    ("files", 0, "bytes"): set(),
    ("files", 0, "rank"): set(),
    ("files", 0, "segments"): set(),
    ("files", 0, "segments", 0): set(),
    ("files", 0, "segments", 0, 0): set(),
    ("files", 0, "segments", 0, 1): set(),
    _T: set(),
    (*_T, "dtype"): set(),
    (*_T, "shape"): set(),
    (*_T, "shape", 0): set(),
    (*_T, "chunks"): set(),
    _CHUNK: set(),
    (*_CHUNK, 0): set(),
    (*_CHUNK, 1): set(),
    (*_CHUNK, 2): set(),
    (*_CHUNK, 2, 0): set(),
    (*_CHUNK, 3): set(),
    (*_CHUNK, 3, 0): set(),
    ("objects", "model"): set(),
    ("objects", "model", "kind"): {"text"},
    ("objects", "model", "per_rank"): {"true"},  # with one rank, it is the same
    ("objects", "model", "trees"): set(),
    ("objects", "model", "trees", 0): set(_ODD),
    ("objects", "optimizer", "trees", 0): set(_ODD),
    ("objects", "scheduler", "trees", 0): set(_ODD),
    ("objects", "extra", "trees", 0): set(_ODD),
    ("objects", "_rng", "trees", 0): set(_ODD),
    ("metrics", "loss"): set(_ODD),
    ("versions", "torch"): set(_ODD),
    ("timings", "write_s"): set(_ODD),
}


def wrong_types() -> Iterator[Case]:
    for path, allowed in _PLACES.items():
        for what, value in _ODD.items():
            name = f"{'.'.join(map(str, path))} is {what}"
            yield replaced(name, path, value, "any" if what in allowed else "refused")
        yield changed(f"{'.'.join(map(str, path))} is missing", lambda body, path=path: drop(body, path), "any")


def drop(body: Any, path: tuple[Any, ...]) -> None:
    for part in path[:-1]:
        body = body[part]
    if path[-1] in body or isinstance(path[-1], int):
        del body[path[-1]]


def numbers() -> Iterator[Case]:
    for what, value in (("-2**63", -(2**63)), ("2**61", 2**61), ("2**62 - 1", 2**62 - 1), ("10**4000", 10**4000)):
        for path in ((*_CHUNK, 1), (*_CHUNK, 0), (*_T, "shape", 0), ("files", 0, "bytes"), ("world_size",)):
            harmless = path == ("world_size",) and 0 < value < 2**62
            verdict: Verdict = "any" if harmless else "refused"
            yield replaced(f"{'.'.join(map(str, path))} is {what}", path, value, verdict)
    for text in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"1" + b"0" * 5000, b"0.1e-400"):
        for path in (("created",), ("step",), ("objects", "epoch", "trees", 0), ("timings", "write_s")):

            def spoil(ground: Ground, text: bytes = text, path: tuple[Any, ...] = path) -> None:
                put(ground.body, path, "@@@")
                raw = json.dumps(ground.body, sort_keys=True, separators=(",", ":")).encode()
                ground.seal_text(raw.replace(b'"@@@"', text))

            yield Case(name=f"{'.'.join(map(str, path))} is {text[:12].decode()}", spoil=spoil, verdict="any")
    for number in (0, -1, 2, 3, 99, 2**40):
        yield replaced(f"the format is {number}", ("format",), number, "any" if number in (0, 2) else "refused")


def nested(depth: int, kind: str) -> bytes:
    pair = {"list": (b"[", b"]"), "object": (b'{"a":', b"}"), "tuple": (b'{"$tuple":[', b"]}")}[kind]
    return pair[0] * depth + b"1" + pair[1] * depth


def depths() -> Iterator[Case]:
    places = (("objects", "extra", "trees", 0), ("config",), ("versions", "torch"), ("parent",), ("writer", "host"))
    for depth in (150, 300, 450, 900, 100_000):
        for path in places:
            for kind in ("list", "object", "tuple") if path[0] == "objects" else ("object",):

                def spoil(ground: Ground, path: Any = path, depth: int = depth, kind: str = kind) -> None:
                    put(ground.body, path, "@@@")
                    raw = json.dumps(ground.body, sort_keys=True, separators=(",", ":")).encode()
                    ground.seal_text(raw.replace(b'"@@@"', nested(depth, kind)))

                yield Case(name=f"{'.'.join(map(str, path))}: {depth} {kind}s deep", spoil=spoil, verdict="any")


def chunks() -> Iterator[Case]:
    """Pieces of a tensor that lie on one another, or leave holes, or do not fit."""
    rows, columns = 64, 96

    def cut(*boxes: tuple[tuple[int, int], tuple[int, int]]) -> Callable[[Body], None]:
        def change(body: Body) -> None:
            file, offset, _, _ = body["tensors"]["table"]["chunks"][0]
            body["tensors"]["table"]["chunks"] = [[file, offset, list(start), list(size)] for start, size in boxes]

        return change

    half = (rows // 2, columns)
    yield changed("two chunks on one place and none on another", cut(((0, 0), half), ((0, 0), half)))
    yield changed("two chunks that overlap by a row", cut(((0, 0), half), ((31, 0), half)))
    quarter = (rows // 2, columns // 2)
    corners = [((r, c), quarter) for r in (0, 32) for c in (0, 48)]
    yield changed("a quarter twice and one not at all", cut(*corners[:3], corners[0]))
    yield changed("a quarter shifted", cut(*corners[:3], ((32, 40), quarter)))
    yield changed("half by rows and half by columns", cut(((0, 0), half), ((0, 0), (rows, columns // 2))))
    yield changed("a column too many", cut(((0, 0), (rows, columns + 1))))
    yield changed("a chunk that begins in its tensor and ends outside", cut(((1, 0), (rows, columns))))
    yield changed("a chunk of no size beside the whole", cut(((0, 0), (rows, columns)), ((3, 0), (0, 5))), "same")
    yield changed("100,000 chunks of no size", cut(((0, 0), (rows, columns)), *[((0, 0), (0, 9))] * 100_000), "same")
    yield changed("100,000 chunks on one row", cut(*[((0, 0), (1, 1))] * 100_000))
    ones = [((r, c), (1, 1)) for r in range(rows) for c in range(columns)]
    yield changed("a chunk for every element, one twice", cut(*ones[:-1], ones[0]))
    for what, start in (("behind", [rows, 0]), ("of another rank", [0]), ("with a dimension too many", [0, 0, 0])):
        yield replaced(f"a chunk's start {what}", (*_CHUNK, 2), start)
    for what, shape in (("of another rank", [rows * columns]), ("turned", [columns, rows]), ("of none", [])):
        yield replaced(f"a chunk's shape {what}", (*_CHUNK, 3), shape)

    def into_header(body: Body) -> None:
        body["tensors"]["table"]["chunks"][0][1] = 0

    yield changed("a chunk over the header", into_header, "any")

    def to_the_end(body: Body) -> None:
        body["tensors"]["table"]["chunks"][0][1] = body["files"][0]["bytes"]

    yield changed("a chunk that begins at the file's end", to_the_end)


def runs() -> Iterator[Case]:
    """Runs of pieces that lie on one another, outside their tensor or files, or are far too many."""
    rows, columns = 64, 96
    row_bytes = 4 * columns

    def of(
        *repeats: Any, file: int = 0, rest: int = 0, start: Any = (0, 0), shape: Any = None
    ) -> Callable[[Body], None]:
        """Cut the table into four files of 16 rows each, as a run."""

        def change(body: Body) -> None:
            body["format"] = 2
            begins = body["tensors"]["table"]["chunks"][0][1] - body["files"][0]["segments"][0][0]
            piece = [file, begins + rest, list(start), list(shape or (rows // 4, columns))]
            copies(body, 3)
            body["tensors"]["table"]["chunks"] = [[*piece, *repeats]]

        return change

    def copies(body: Body, count: int) -> None:
        first = body["files"][0]
        body["files"] += [{**deepcopy(first), "name": f"{first['name']}.{number}"} for number in range(count)]

    def short(body: Body) -> None:
        body["files"][2].update(bytes=9, segments=[[9, "0" * 32]])

    four = [[0, 4, 1]]
    # The files that are named are not there: what is right in itself goes no further.
    yield changed("a run of four files, three of which are not there", of(four))
    yield changed("a run whose first piece is twice there", of([[0, 4, 1], [1, 2, 1]]))
    yield changed("a run that covers the table twice", of([[0, 4, 1]], shape=(rows // 2, columns)))
    yield changed("a run that leaves the tensor", of(four, start=(1, 0)))
    yield changed("a run along columns that are not there", of([[1, 4, 1]]))
    yield changed("a run behind the last file", of(four, file=1))
    yield changed("a run that ends behind the last file", of([[0, 5, 1]]))
    yield changed("a run beyond some of its files", of(four, rest=1 << 40))
    yield changed("a run whose last piece ends outside its file", of(four, rest=rows * row_bytes * 2))
    yield changed("a run in a file of too few bytes", lambda body: (of(four)(body), short(body)))
    yield changed("a run in the first format", lambda body: (of(four)(body), body.update(format=1)))
    yield changed("a run of 1,000,000 files, none of them there", of([[0, 1_000_000, 1]], shape=(1, 1)))
    for number in (2**62, 2**61, 0, 1, -1, -(2**62), 2**4000):
        yield changed(f"a run of {str(number)[:12]} pieces", of([[0, number, 1]]))
        yield changed(f"a run of {str(number)[:12]} pieces of no size", of([[0, number, 1]], shape=(0, columns)))
        if number != 1:
            yield changed(f"a run with files {str(number)[:12]} apart", of([[0, 4, number]]))
            yield changed(f"a run along dimension {str(number)[:12]}", of([[number, 4, 1]] if number else [[0, 4, 0]]))
    for level in (2, 8, 9, 10_000):
        yield changed(f"a run of runs, {level} deep", of([[0, 2, 2 ** min(n, 61)] for n in range(level)]))
        yield changed(f"a run of runs of one file, {level} deep", of([[0, 2, 1]] * level))
    for what, odd in (("null", None), ("a number", 4), ("text", "abc"), ("an object", {"a": 1}), ("nothing", [])):
        yield changed(f"repeats that are {what}", of(odd))
        yield changed(f"a repeat that is {what}", of([odd]))
        yield changed(f"a repeat with {what} in it", of([[0, odd, 1]]))
    yield changed("a repeat of four numbers", of([[0, 4, 1, 1]]))
    yield changed("a chunk of six parts", of(four, four))

    def ways(body: Body) -> None:
        """Name sets of files in ever other ways, so that a look at each would take for ever."""
        body["format"] = 2
        copies(body, 6_000)
        entry = body["tensors"]["table"]
        chunk = [0, 0, [0], [1]]
        body["tensors"].update(
            {
                f"extra.{n}": {"dtype": "U8", "shape": [6_000 - n], "chunks": [[n, *chunk[1:], [[0, 6_000 - n, 1]]]]}
                for n in range(5_000)
            }
        )
        assert entry is body["tensors"]["table"]

    yield changed("5,000 tensors in runs of 6,000 files, each in another way", ways)


def shapes() -> Iterator[Case]:
    for what, shape in (
        ("whose product overflows", [2**61, 2**61]),
        ("of nothing, but huge", [0, 2**61, 2**61]),
        ("of 1,000 dimensions", [1] * 998 + [64, 96]),
        ("of 100,000 dimensions", [1] * 99_998 + [64, 96]),
        ("of a terabyte", [2**38]),
    ):

        def change(body: Body, shape: list[int] = shape) -> None:
            entry = body["tensors"]["table"]
            entry["shape"] = shape
            entry["chunks"] = [[*entry["chunks"][0][:2], [0] * len(shape), shape]]

        yield changed(f"a shape {what}", change)

        def in_value(body: Body, shape: list[int] = shape) -> None:
            first = body["tensors"]["table"]["chunks"][0]
            body["tensors"]["extra.new"] = {
                "dtype": "F32",
                "shape": shape,
                "chunks": [[*first[:2], [0] * len(shape), shape]],
            }
            body["objects"]["extra"]["trees"] = [{"$tensor": "extra.new"}]

        yield changed(f"a new tensor {what}", in_value, "any" if 0 in shape or len(shape) > 2 else "refused")
    for dtype in ("OBJ", "f32", "", "F32\0", "F" * 10_000_000, "C256", "float32"):
        yield replaced(f"the dtype {dtype[:12]!r}", (*_T, "dtype"), dtype)
    yield replaced("a dtype half as wide", (*_T, "dtype"), "F16")
    yield replaced("a dtype as wide", (*_T, "dtype"), "I32")

    def terabyte(body: Body) -> None:
        size = 1 << 40
        body["files"].append({"name": "x/y", "rank": 0, "bytes": size, "segments": [[size, "0" * 32]]})
        index = len(body["files"]) - 1
        body["tensors"]["extra.new"] = {"dtype": "U8", "shape": [size], "chunks": [[index, 0, [0], [size]]]}
        body["objects"]["extra"]["trees"] = [{"$tensor": "extra.new"}]

    yield changed("a terabyte in a file that is not there", terabyte)

    def short(ground: Ground) -> None:
        terabyte(ground.body)
        (ground.folder / "x").mkdir()
        (ground.folder / "x" / "y").write_bytes(b"short")
        ground.seal()

    yield Case(name="a terabyte in a file of 5 bytes", spoil=short)

    def sparse(ground: Ground) -> None:
        terabyte(ground.body)
        size = 8 << 30
        ground.body["files"][-1].update(bytes=size, segments=[[size, "0" * 32]])
        ground.body["tensors"]["extra.new"].update(shape=[size], chunks=[[1, 0, [0], [size]]])
        (ground.folder / "x").mkdir()
        with (ground.folder / "x" / "y").open("wb") as file:
            file.truncate(size)
        ground.seal()

    yield Case(name="one segment of 8 GiB in a file full of holes", spoil=sparse)

    def aliases(body: Body) -> None:
        entry = body["tensors"]["table"]
        body["tensors"].update({f"extra.{i}": deepcopy(entry) for i in range(4_000)})
        body["objects"]["extra"]["trees"] = [[{"$tensor": f"extra.{i}"} for i in range(4_000)]]

    yield changed("4,000 tensors in the bytes of one", aliases)

    def references(body: Body) -> None:
        body["objects"]["extra"]["trees"] = [[{"$tensor": "table"}] * 5_000]

    yield changed("one tensor in 5,000 places", references, "any")


_NAMES = {
    "absolute": "/etc/passwd",
    "above": "../step-000000000020/manifest.json",
    "far above": "../" * 40 + "etc/passwd",
    "above in the middle": "a/../../b",
    "this folder": "./a",
    "empty": "",
    "a slash": "/",
    "ending in a slash": "a/",
    "with two slashes": "a//b",
    "with a NUL": "a\0b",
    "with a newline": "a\nb",
    "with an escape": "\x1b[2Ja",
    "hidden": ".hidden",
    "an option": "-rf",
    "with a backslash": "..\\..\\a",
    "with letters beyond ASCII": "\uff45\uff54\uff43",
    "half a character": "\ud800",
    "of 10 MB": "a" * 10_000_000,
    "of 2,000 folders": "a/" * 2_000 + "a",
    "a URL": "file:///etc/passwd",
    "a variable": "$HOME",
    "the manifest itself": "manifest.json",
    "not there": "b/rank-00009.safetensors",
}


def names() -> Iterator[Case]:
    for what, name in _NAMES.items():
        yield replaced(f"a file's name {what}", ("files", 0, "name"), name)
    for what in ("above", "absolute", "with a NUL", "empty", "of 10 MB", "half a character"):
        yield replaced(f"an attempt {what}", ("attempt",), _NAMES[what])
    yield changed("two files of one name", lambda body: body["files"].append(deepcopy(body["files"][0])))
    for what in ("with a NUL", "with a newline", "with an escape", "half a character", "of 10 MB", "empty", "absolute"):
        name = _NAMES[what]
        yield changed(f"a key {what}", lambda body, name=name: move(body["objects"], "epoch", name), "any")
        yield changed(f"a tensor {what}", lambda body, name=name: rename_tensor(body, name), "same")
        yield replaced(f"a metric {what}", ("metrics", name), 1.0, "same")
        yield replaced(f"a setting {what}", ("config",), {name: name}, "same")
        yield replaced(f"a value {what}", ("objects", "extra", "trees", 0), {name: name}, "any")
        yield replaced(f"a run {what}", ("run",), name, "same")
    dots = ".".join("a" * 5_000)
    yield changed("a key of 5,000 dots", lambda body: move(body["objects"], "epoch", dots), "any")

    def dotted(body: Body) -> None:
        body["objects"]["model"]["trees"][0][dots] = {"$tensor": "table"}

    yield changed("a parameter of 5,000 dots", dotted, "any")


def move(mapping: dict[str, Any], old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


def rename_tensor(body: Body, name: str) -> None:
    move(body["tensors"], "table", name)
    body["objects"]["table"]["trees"] = [{"$tensor": name}]


_TREES: dict[str, Any] = {
    "an unknown tag": {"$exec": "import os"},
    "a tag beside others": {"$tuple": [], "a": 1},
    "a tag behind others": {"a": 1, "$tuple": []},
    "a tuple of no list": {"$tuple": 3},
    "a reference to nothing": {"$tensor": "nothing"},
    "a reference to a number": {"$tensor": 3},
    "a reference to a list": {"$tensor": ["table"]},
    "an array of text": {"$array": {"$array": "table"}},
    "pairs of one": {"$dict": [[1]]},
    "pairs of three": {"$dict": [[1, 2, 3]]},
    "pairs that are none": {"$dict": [5]},
    "pairs that are text": {"$dict": ["ab"]},
    "a list as a key": {"$dict": [[[1], 2]]},
    "a dict as a key": {"$dict": [[{"a": 1}, 2]]},
    "a tensor as a key": {"$dict": [[{"$tensor": "table"}, 2]]},
    "a counter of lists": {"$counter": [["a", [1]]]},
    "a counter of pairs of one": {"$counter": [["a"]]},
    "bytes that are none": {"$bytes": "!!"},
    "bytes of letters beyond ASCII": {"$bytes": "ä"},
    "bytes that are a number": {"$bytes": 7},
    "a float of text": {"$float": "1e5"},
    "a float that is a list": {"$float": []},
    "a NumPy scalar of nothing": {"$numpy": []},
    "a NumPy scalar without a value": {"$numpy": ["float32"]},
    "a NumPy scalar of objects": {"$numpy": ["O", 1]},
    "a NumPy scalar of records": {"$numpy": ["i4,i4", 1]},
    "a NumPy scalar of many records": {"$numpy": ["i4," * 20_000 + "i4", 1]},
    "a NumPy scalar of an array": {"$numpy": ["(1000,1000,1000)f8", 1]},
    "a NumPy scalar of a gigabyte": {"$numpy": ["S1000000000", "a"]},
    "a NumPy scalar of a void": {"$numpy": ["V2000000000", "a"]},
    "a NumPy scalar of dates": {"$numpy": ["M8[s]", 1]},
    "a NumPy scalar of code": {"$numpy": ["(__import__('os').getcwd(),)i4", 1]},
    "a NumPy scalar of no type": {"$numpy": ["nothing", 1]},
    "a NumPy scalar with a list": {"$numpy": ["int64", [1, 2]]},
    "a NumPy scalar with a dict": {"$numpy": ["int64", {"a": 1}]},
    "a NumPy scalar with nothing": {"$numpy": ["int64", None]},
    "a NumPy scalar too large": {"$numpy": ["int8", 300]},
    "a NumPy scalar of huge text": {"$numpy": ["int64", "9" * 5000]},
    "a NumPy scalar of two texts": {"$numpy": ["complex64", "a", "b"]},
    "a NumPy scalar of three": {"$numpy": ["complex64", "1", "2", "3"]},
    "a NumPy scalar of a long number": {"$numpy": ["float64", 10**400]},
}


def trees() -> Iterator[Case]:
    for what, tree in _TREES.items():
        yield replaced(f"a value that is {what}", ("objects", "extra", "trees", 0), tree, "any")
    for key in ("model", "optimizer", "scheduler", "_rng"):
        for what in ("a reference to nothing", "a tensor as a key", "a NumPy scalar of records", "a tuple of no list"):
            tree = {"$dict": [["a", _TREES[what]]]}
            yield replaced(f"{key} with {what}", ("objects", key, "trees", 0), tree, "any")
    optimizer = ("objects", "optimizer", "trees", 0)
    groups = [{"params": [0, 1, 2, 3, 4, 5]}]
    for what, tree in {
        "without a state": {"param_groups": groups},
        "with a state that is a list": {"param_groups": groups, "state": []},
        "with groups without settings": {"param_groups": groups, "state": {}},
        "with parameters that are text": {"param_groups": [{"params": "abcdef"}], "state": {}},
        "with parameters that are a number": {"param_groups": [{"params": 6}], "state": {}},
        "with parameters that are lists": {"param_groups": [{"params": [[0]] * 6}], "state": {}},
        "with a parameter's state that is a number": {"param_groups": groups, "state": {"$dict": [[0, 5]]}},
        "with a group that is a list": {"param_groups": [[]], "state": {}},
        "with another tensor as momentum": {
            "param_groups": groups,
            "state": {"$dict": [[0, {"step": {"$tensor": "table"}}]]},
        },
    }.items():
        yield replaced(f"an optimizer {what}", optimizer, tree, "any")
    rng = ("objects", "_rng", "trees", 0)
    for what, tree in {
        "of nothing": {},
        "of numbers": {"numpy": 1, "python": 2, "torch": 3},
        "of other tensors": {
            "numpy": {"$tensor": "table"},
            "python": {"$tensor": "table"},
            "torch": {"$tensor": "table"},
        },
        "of another version": {"python": {"gauss": None, "version": 99, "words": [1]}, "numpy": {}, "torch": 1},
    }.items():
        yield replaced(f"generators {what}", rng, tree, "any")
    yield replaced("a model of texts", ("objects", "model", "trees", 0), {"0.weight": "x"}, "any")
    yield replaced("an epoch that is a tensor", ("objects", "epoch", "trees", 0), {"$tensor": "table"}, "any")
    yield replaced("a table that is text", ("objects", "table", "trees", 0), "x", "any")
    yield replaced("a table that is an array", ("objects", "table", "trees", 0), {"$array": "table"}, "any")
    step_of = {"step": "x", "last_epoch": [], "_step_count": None, "optimizer": 1, "base_lrs": "x"}
    yield replaced("a scheduler that hides its methods", ("objects", "scheduler", "trees", 0), step_of, "any")


def counts() -> Iterator[Case]:
    yield replaced("no trees", ("objects", "epoch", "trees"), [])
    yield replaced("two trees for all ranks", ("objects", "epoch", "trees"), [1, 2])
    yield replaced("100,000 ranks and one tree", ("world_size",), 100_000)

    def crowd(body: Body) -> None:
        body["world_size"] = 3_000
        body["objects"] = {
            key: {**entry, "trees": entry["trees"] * 3_000} if entry["per_rank"] and key != "_rng" else entry
            for key, entry in body["objects"].items()
            if key != "_rng"
        }
        body["objects"]["crowd"] = {"kind": "value", "per_rank": True, "trees": [1] * 3_000}

    yield changed("3,000 ranks", crowd, "any")
    for key, count in (("metrics", 3_000), ("versions", 3_000), ("timings", 3_000), ("config", 3_000)):
        value = "1" if key == "versions" else 1.0
        yield replaced(f"{count:,} {key}", (key,), dict.fromkeys((f"k{i}" for i in range(count)), value), "same")
    many = 100_000
    yield changed(
        f"{many:,} empty files",
        lambda body: body["files"].extend(
            {"name": f"e/{i}", "rank": 0, "bytes": 0, "segments": []} for i in range(many)
        ),
    )
    many = 3_000  # to draw a row takes a millisecond
    empty = {"dtype": "F32", "shape": [0], "chunks": []}
    yield changed(
        f"{many:,} empty tensors", lambda b: b["tensors"].update({f"e{i}": empty for i in range(many)}), "same"
    )
    yield changed(
        f"{many:,} keys", lambda b: b["objects"].update({f"e{i}": b["objects"]["epoch"] for i in range(many)}), "any"
    )

    def crumbs(ground: Ground) -> None:
        data = ground.data_file.read_bytes()
        ground.body["files"][0]["segments"] = [[1, digest(data[i : i + 1])] for i in range(len(data))]
        ground.seal()

    yield Case(name="a segment for every byte", spoil=crumbs, verdict="same")


def sums() -> Iterator[Case]:
    first = ("files", 0, "segments", 0)
    yield replaced("a digest of zeros", (*first, 1), "0" * 32)
    yield replaced("a digest in capitals", (*first, 1), "A" * 32)
    yield replaced("a digest too short", (*first, 1), "0" * 31)
    yield replaced("a segment of no bytes", (*first, 0), 0)
    yield changed("no segments", lambda body: body["files"][0].update(segments=[]))
    yield changed("no segments and no bytes", lambda body: body["files"][0].update(segments=[], bytes=0))
    yield changed("segments in another order", lambda body: body["files"][0]["segments"].reverse())
    yield changed("a segment too many", lambda body: body["files"][0]["segments"].append([5, "0" * 32]))

    def one_less(body: Body) -> None:
        body["files"][0]["bytes"] -= 1
        body["files"][0]["segments"][-1][0] -= 1

    yield changed("a byte less", one_less)
    yield changed("no files", lambda body: body.update(files=[]))
    yield changed("no tensors", lambda body: body.update(tensors={}))
    yield changed("no objects", lambda body: body.update(objects={}))
    yield replaced("another step", ("step",), 31, "same")

    def other_data(ground: Ground) -> None:
        ground.rewrite(bytes(len(ground.data_file.read_bytes())))
        ground.seal()

    yield Case(name="a data file of zeros, sealed", spoil=other_data, verdict="any")


def texts() -> Iterator[Case]:
    def raw(name: str, change: Callable[[bytes], bytes], verdict: Verdict = "refused") -> Case:
        def spoil(ground: Ground) -> None:
            path = ground.folder / "manifest.json"
            path.write_bytes(change(path.read_bytes()))

        return Case(name=f"a manifest {name}", spoil=spoil, verdict=verdict)

    yield raw("of nothing", lambda data: b"")
    yield raw("of zeros", lambda data: bytes(len(data)))
    yield raw("that is the digest alone", lambda data: data[-44:])
    yield raw("without its last newline", lambda data: data[:-1])
    yield raw("with a byte more", lambda data: data + b"\n")
    yield raw("sealed twice", lambda data: sealed(data[:-1]), "same")
    yield raw("with a mark of byte order", lambda data: sealed(b"\xef\xbb\xbf" + data[:-44] + b"}"))
    yield raw("in UTF-16", lambda data: sealed(data[:-44].decode().encode("utf-16") + b"}"))
    yield raw("that is no UTF-8", lambda data: sealed(data[:-44] + b',"z":"\xff\xfe"}'))
    yield raw("that is a list", lambda data: sealed(b"[1]"))
    yield raw("that is a number", lambda data: sealed(b"1}"))
    yield raw("with two roots", lambda data: sealed(data[:-44] + b"}{}"))
    yield raw("with a key twice", lambda data: sealed(data[:-44] + b',"step":31}'), "same")
    yield raw("with an unknown key", lambda data: sealed(data[:-44] + b',"x":{"y":1}}'), "same")
    yield raw("of 60 MB of spaces", lambda data: sealed(data[:-44] + b" " * 60_000_000 + b"}"), "same")
    yield raw(
        "of 3 million empty lists", lambda data: sealed(data[:-44] + b',"x":[' + b"[]," * 3_000_000 + b"0]}"), "same"
    )
    yield raw("that is another's", lambda data: data.replace(b"step", b"stop"))


def files() -> Iterator[Case]:
    """Folders, links and pipes in the place of files."""

    def in_place_of_data(name: str, make: Callable[[Path, Ground], object], verdict: Verdict = "refused") -> Case:
        def spoil(ground: Ground) -> None:
            path = ground.data_file
            path.rename(ground.root / "aside")
            make(path, ground)

        return Case(name=f"a data file that is {name}", spoil=spoil, verdict=verdict)

    def in_place_of_manifest(name: str, make: Callable[[Path, Ground], object]) -> Case:
        def spoil(ground: Ground) -> None:
            path = ground.folder / "manifest.json"
            path.rename(ground.root / "aside")
            make(path, ground)

        return Case(name=f"a manifest that is {name}", spoil=spoil)

    makers: dict[str, Callable[[Path, Ground], object]] = {
        "a folder": lambda path, ground: path.mkdir(),
        "a pipe": lambda path, ground: os.mkfifo(path),
        "a link to itself": lambda path, ground: path.symlink_to(path.name),
        "a link to nothing": lambda path, ground: path.symlink_to("nothing"),
        "a link to /etc/passwd": lambda path, ground: path.symlink_to("/etc/passwd"),
        "a link to endless zeros": lambda path, ground: path.symlink_to("/dev/zero"),
        "a link to the right one": lambda path, ground: path.symlink_to(ground.root / "aside"),
    }
    for name, make in makers.items():
        yield in_place_of_data(name, make)
        yield in_place_of_manifest(name, make)

    def linked_folder(ground: Ground) -> None:
        folder = ground.data_file.parent
        folder.rename(ground.root / "aside")
        folder.symlink_to(ground.root / "aside")

    yield Case(name="an attempt that is a link", spoil=linked_folder)

    def linked_step(ground: Ground) -> None:
        ground.folder.rename(ground.root / "aside")
        ground.folder.symlink_to(ground.root / "aside")

    yield Case(name="a step that is a link", spoil=linked_step, verdict="any")

    def many_links(ground: Ground) -> None:
        for index in range(2_000):
            (ground.folder / f"link-{index}").symlink_to("/")

    yield Case(name="2,000 links to the root", spoil=many_links, verdict="same")

    def odd_names(ground: Ground) -> None:
        for name in (b"\xff\xfe", b"a\nb", b"\x1b[2J", b"-rf", b"step-\xd9\xa0" * 3):
            Path(os.fsdecode(os.fsencode(ground.folder) + b"/" + name)).write_bytes(b"x")
        (ground.root / ("step-" + "\u0660" * 12)).mkdir()
        (ground.root / ("step-" + "9" * 240)).mkdir()
        shutil.copy(ground.folder / "manifest.json", ground.root / ("step-" + "9" * 240))

    yield Case(name="odd names beside the files", spoil=odd_names, verdict="same")


def all_cases() -> list[Case]:
    makers = (wrong_types, numbers, depths, chunks, runs, shapes, names, trees, counts, sums, texts, files)
    return [case for make in makers for case in make()]
