"""Files of other tools made to harm: pickles that run code or take all memory, archives and headers that lie."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as save_safetensors
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """One hostile file or folder: its name, and what makes it below a folder that is given."""

    name: str
    path: str
    make: Callable[[Path], object]
    loads: bool = False


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


WEIGHTS = model().state_dict()
WHOLE = saved(WEIGHTS)


def rezipped(
    data: bytes, edit: Callable[[str, bytes], bytes | None] = lambda name, part: part, *, compress: bool = False
) -> bytes:
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", kind) as new:
        for info in old.infolist():
            part = edit(info.filename, old.read(info))
            if part is not None:
                new.writestr(info.filename, part)
    return out.getvalue()


def with_pickle(body: bytes) -> bytes:
    """Return a file of torch.save whose pickle is `body`."""
    return rezipped(WHOLE, lambda name, part: body if name.endswith("data.pkl") else part)


def call(module: str, name: str, argument: bytes) -> bytes:
    """Return pickle opcodes that call a function with one argument."""
    return b"c" + f"{module}\n{name}\n".encode() + argument + b"\x85R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def held(opcodes: bytes) -> bytes:
    """Return a pickle of a dict that holds what opcodes make."""
    return b"\x80\x02}" + text("w") + opcodes + b"s."


def doubling(levels: int) -> bytes:
    """Return opcodes of a tuple that holds itself twice at each level."""
    steps = b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(levels))
    return b")" + steps


CALLS = {
    "os.system": ("os", "system", text("touch code-ran")),
    "posix.system": ("posix", "system", text("touch code-ran")),
    "nt.system": ("nt", "system", text("touch code-ran")),
    "subprocess.Popen": ("subprocess", "Popen", text("touch code-ran")),
    "builtins.eval": ("builtins", "eval", text("__import__('os').mkdir('code-ran')")),
    "builtins.exec": ("builtins", "exec", text("import os; os.mkdir('code-ran')")),
    "python 2's eval": ("__builtin__", "eval", text("1+1")),
    "builtins.getattr": ("builtins", "getattr", text("x")),
    "builtins.__import__": ("builtins", "__import__", text("antigravity")),
    "builtins.open": ("builtins", "open", text("/etc/passwd")),
    "functools.partial": ("functools", "partial", b"cos\nsystem\n"),
    "operator.attrgetter": ("operator", "attrgetter", text("__class__.__base__")),
    "importlib": ("importlib", "import_module", text("this")),
    "runpy": ("runpy", "run_path", text("/etc/passwd")),
    "pickle.loads": ("pickle", "loads", text("x")),
    "a name with dots": ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__", text("x")),
    "torch.load": ("torch", "load", text("/etc/passwd")),
    "torch.hub": ("torch.hub", "load_state_dict_from_url", text("http://127.0.0.1:9/x")),
    "torch's from_file": ("torch", "UntypedStorage.from_file", text("/etc/passwd")),
    "pathlib": ("pathlib", "Path.read_text", text("/etc/passwd")),
    "numpy.load": ("numpy", "load", text("/etc/passwd")),
    "ctypes": ("ctypes", "CDLL", text("libc.so.6")),
    "webbrowser": ("webbrowser", "open", text("http://127.0.0.1")),
    "types.CodeType": ("types", "CodeType", text("x")),
    "a module that is not there": ("no_such_module_at_all", "x", text("x")),
}

BOMBS = {
    "a bytearray of a gigabyte": held(call("builtins", "bytearray", b"J" + struct.pack("<i", 1 << 30))),
    "a bytearray of a terabyte": held(call("builtins", "bytearray", b"\x8a\x06" + (1 << 40).to_bytes(6, "little"))),
    "a key that holds itself often": b"\x80\x02}" + doubling(60) + b"K\x01s.",
    "a value that holds itself often": held(doubling(60)),
    "room for two billion values": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "a frame of exabytes": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
    "bytes of exabytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "a bytearray of exabytes": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "100,000 marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "100,000 lists in each other": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a storage of a terabyte": held(call("torch", "UntypedStorage", b"\x8a\x06" + (1 << 40).to_bytes(6, "little"))),
    "a tensor of a terabyte": held(call("torch", "FloatTensor", b"\x8a\x06" + (1 << 38).to_bytes(6, "little"))),
    "an underflow": b"\x80\x02R.",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "an unknown opcode": b"\x80\x02\xff.",
    "an extension's number": b"\x80\x02\x82\x01.",
    "persistent text": b"Pabc\n.",
    "a persistent number": b"\x80\x02K\x01Q.",
    "an instance": b"(ios\nsystem\n.",
    "an object": b"(cos\nsystem\no.",
    "a class that is built upon": b"\x80\x02ccollections\nOrderedDict\n}" + text("x") + b"K\x01sb.",
    "a setting of a class": b"\x80\x02ccollections\nOrderedDict\nN}" + text("keys") + b"K\x01s\x86b.",
}


def torch_files() -> Iterator[Foreign]:
    def case(name: str, data: bytes, *, loads: bool = False, suffix: str = "pt") -> Foreign:
        path = f"weights.{suffix}"
        return Foreign(name=name, path=path, make=lambda root: (root / path).write_bytes(data), loads=loads)

    yield case("a whole file", WHOLE, loads=True)
    yield case("a whole file of the old format", saved(WEIGHTS, _use_new_zipfile_serialization=False), loads=True)
    yield case("a whole file that another tool has zipped", rezipped(WHOLE), loads=True)
    for what, arguments in CALLS.items():
        opcodes = held(call(*arguments))
        yield case(f"a zipped pickle that calls {what}", with_pickle(opcodes))
        yield case(f"a bare pickle that calls {what}", opcodes)
    old = saved(WEIGHTS, _use_new_zipfile_serialization=False)
    at = old.index(b"\x80\x02ccollections\nOrderedDict\n")
    yield case("an old file that calls os.system", old[:at] + held(call("os", "system", text("x"))) + old[at:])
    for what, body in BOMBS.items():
        yield case(f"a zipped pickle with {what}", with_pickle(body))
        yield case(f"a bare pickle with {what}", body)
    yield case("an archive that is compressed", rezipped(WHOLE, compress=True))
    yield case("an archive of 200 MB of zeros, compressed", bomb())
    yield case("an archive cut in half", WHOLE[: len(WHOLE) // 2])
    yield case("an archive without its last byte", WHOLE[:-1])
    yield case("an archive with a byte more", WHOLE + b"x")
    yield case("an archive without its pickle", rezipped(WHOLE, lambda n, p: None if n.endswith(".pkl") else p))
    yield case("an archive without its data", rezipped(WHOLE, lambda n, p: None if "/data/" in n else p))
    yield case("an archive with short data", rezipped(WHOLE, lambda n, p: p[:4] if "/data/" in n else p))
    yield case("an archive whose parts overlap", overlapping())
    yield case("an archive with a second end", WHOLE + WHOLE[-22:])
    yield case("an archive with two tables", rezipped(WHOLE) + rezipped(with_pickle(held(call(*CALLS["os.system"])))))
    yield case("an archive with names that leave", slipping())
    yield case("an archive of a script", torch_script())
    yield case("an empty file", b"")
    yield case("noise", bytes(range(256)) * 20)
    yield case("a list", saved([1, 2]))
    yield case("a tensor", saved(torch.ones(3)))
    zeros = {name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in WEIGHTS.items()}
    yield case("tensors of one element, repeated", saved(zeros), loads=True)
    first = next(iter(WEIGHTS))
    sparse = {**WEIGHTS, first: WEIGHTS[first].to_sparse()}
    yield case("a sparse tensor", saved(sparse))
    yield case("a tensor on no device", saved({**WEIGHTS, first: WEIGHTS[first].to("meta")}))
    yield case("a value for a tensor", saved({**WEIGHTS, first: 5}))
    yield case("keys that are tuples", saved({(1, 2): torch.ones(2), **{("a",): 1}}))
    for suffix in ("pth", "tar", "bin", "ckpt"):
        yield case(f"a call in a .{suffix}", with_pickle(held(call(*CALLS["os.system"]))), suffix=suffix)


def bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, bytes(200 << 20) if info.filename.endswith("data/0") else old.read(info))
    return out.getvalue()


def overlapping() -> bytes:
    """Return an archive of which a thousand entries are one and the same megabyte."""
    part = bytes(1 << 20)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data/0", part)
        first = archive.infolist()[0]
        for index in range(1, 1000):
            twin = zipfile.ZipInfo(f"archive/data/{index}")
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            twin.file_size = twin.compress_size = first.file_size
            archive.filelist.append(twin)
        archive.writestr("archive/data.pkl", held(b"K\x01"))
    return out.getvalue()


def slipping() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("../../code-ran", "/tmp/code-ran", "archive/../../code-ran"):
            archive.writestr(name, b"x")
    return out.getvalue()


def torch_script() -> bytes:
    def edit(name: str, part: bytes) -> bytes:
        return part

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(rezipped(WHOLE, edit))) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        new.writestr("archive/constants.pkl", b"\x80\x02).")
        new.writestr("archive/code/x.py", b"import os; os.mkdir('code-ran')")
    return out.getvalue()


def safetensors_files() -> Iterator[Foreign]:
    whole = save_safetensors(WEIGHTS)
    size = struct.unpack("<Q", whole[:8])[0]
    header, payload = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    first = next(iter(WEIGHTS))

    def made(text_: bytes, length: int | None = None, data: bytes = payload) -> bytes:
        return struct.pack("<Q", len(text_) if length is None else length) + text_ + data

    def case(name: str, data: bytes, *, loads: bool = False) -> Foreign:
        return Foreign(
            name=f"safetensors: {name}",
            path="weights.safetensors",
            make=lambda root: (root / "weights.safetensors").write_bytes(data),
            loads=loads,
        )

    def edited(**facts: Any) -> bytes:
        return made(json.dumps({**header, first: {**header[first], **facts}}).encode())

    own = json.dumps(header).encode()
    yield case("a whole file", whole, loads=True)
    for length in (0, 1, size - 1, size + 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1):
        yield case(f"a header of {length} bytes", made(own, length))
    for what, facts in {
        "offsets from behind": {"data_offsets": [8, 0]},
        "offsets below 0": {"data_offsets": [-8, 0]},
        "offsets beyond the end": {"data_offsets": [0, 2**40]},
        "offsets of 2**64": {"data_offsets": [0, 2**64]},
        "offsets that overlap": {"data_offsets": [4, 28]},
        "three offsets": {"data_offsets": [0, 1, 2]},
        "a shape of 2**40": {"shape": [2**40]},
        "a shape that overflows": {"shape": [2**33, 2**33]},
        "a shape below 0": {"shape": [-1]},
        "a shape of nothing but huge": {"shape": [0, 2**62], "data_offsets": [0, 0]},
        "a shape of 1,000 dimensions": {"shape": [1] * 1000},
        "an unknown dtype": {"dtype": "OBJ"},
        "a dtype that is a number": {"dtype": 5},
        "a dtype of half a byte": {"dtype": "F4", "shape": [12]},
        "no dtype": {"dtype": None},
    }.items():
        yield case(what, edited(**facts))
    twice = own[:-1] + b"," + json.dumps(first).encode() + b":" + json.dumps(header[first]).encode() + b"}"
    yield case("a name twice, the same each time", made(twice), loads=True)
    yield case("a header that is a list", made(b"[1, 2]"))
    yield case("a header that is no JSON", made(b"{" * 50))
    yield case("a header of 100,000 braces", made(b'{"a":' * 100_000 + b"1" + b"}" * 100_000))
    yield case("a header that is no UTF-8", made(own[:-1] + b',"\xff\xfe":1}'))
    yield case("a header of spaces", made(b" " * 1000))
    yield case("metadata that is a number", made(json.dumps({**header, "__metadata__": 5}).encode()))
    yield case("metadata of numbers", made(json.dumps({**header, "__metadata__": {"a": 5}}).encode()))
    yield case("a hole in the data", made(own, data=payload[:-4]))
    yield case("data that nobody names", made(own, data=payload + b"1234"))
    yield case("a name of 10 MB", made(json.dumps({**header, "a" * 10_000_000: header[first]}).encode()))
    yield case("nothing", b"")
    yield case("seven bytes", b"1234567")


def whole_dcp(root: Path) -> Path:
    folder = root / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(WEIGHTS), checkpoint_id=folder, no_dist=True)
    return folder


def dcp_folders() -> Iterator[Foreign]:
    def case(name: str, change: Callable[[Path], object], *, loads: bool = False) -> Foreign:
        return Foreign(name=f"DCP: {name}", path="dcp", make=lambda root: change(whole_dcp(root)), loads=loads)

    def with_metadata(name: str, data: bytes) -> Foreign:
        return case(name, lambda folder: (folder / ".metadata").write_bytes(data))

    yield case("a whole folder", lambda folder: None, loads=True)
    for what, arguments in CALLS.items():
        yield with_metadata(f"a call of {what}", held(call(*arguments)))
        yield with_metadata(f"a call of {what} by name on the stack", stacked(*arguments))
    for what, body in BOMBS.items():
        yield with_metadata(what, body)
    for what, change in TAMPERED.items():
        yield case(what, lambda folder, change=change: tamper(folder, change))
    names = "torch.distributed.checkpoint.metadata"
    for record in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties"):
        class_ = f"c{names}\n{record}\n".encode()
        yield with_metadata(
            f"{record} with odd arguments", b"\x80\x02" + class_ + b"(K\x01K\x02K\x03K\x04K\x05K\x06K\x07tR."
        )
        yield with_metadata(
            f"a setting of the class {record}", b"\x80\x02" + class_ + b"N}" + text("__eq__") + b"K\x01s\x86b."
        )
        yield with_metadata(f"{record} alone", b"\x80\x02" + class_ + b".")
        yield with_metadata(f"{record} of nothing", b"\x80\x02" + class_ + b")\x81.")
        yield with_metadata(f"{record} with a state that is text", b"\x80\x02" + class_ + b")\x81" + text("x") + b"b.")
    path = b"cpathlib\nPosixPath\n"
    yield with_metadata(
        "a setting of the class of paths", b"\x80\x02" + path + b"N}" + text("open") + path + b"s\x86b."
    )
    yield with_metadata("a bare size of texts", b"\x80\x02ctorch\nSize\n(" + text("x") + b"t\x85R.")

    def link(target: str) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            data = next(folder.glob("*.distcp"))
            data.rename(folder.parent / "aside")
            data.symlink_to(target)

        return change

    for target in ("../aside", "/etc/passwd", "/dev/zero", "nothing", "__0_0.distcp"):
        yield case(f"a data file that is a link to {target}", link(target))

    def pipe(folder: Path) -> None:
        data = next(folder.glob("*.distcp"))
        data.unlink()
        os.mkfifo(data)

    yield case("a data file that is a pipe", pipe)
    yield case("a data file that is missing", lambda folder: next(folder.glob("*.distcp")).unlink())
    yield case("a data file cut in half", lambda folder: os.truncate(next(folder.glob("*.distcp")), 900))
    yield case("a data file of zeros", lambda f: (p := next(f.glob("*.distcp"))).write_bytes(bytes(p.stat().st_size)))

    def metadata_link(folder: Path) -> None:
        (folder / ".metadata").rename(folder.parent / "aside")
        (folder / ".metadata").symlink_to("../aside")

    yield case("a .metadata that is a link", metadata_link)

    def call_in_data(folder: Path) -> None:
        data = next(folder.glob("*.distcp"))
        data.write_bytes(
            data.read_bytes().replace(b"torch._utils\n_rebuild_tensor_v2", b"posix\nsystem\n#############..."[:31])
        )

    yield case("a data file whose pickles call", call_in_data)


def stacked(module: str, name: str, argument: bytes) -> bytes:
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + argument + b"\x85R."


def tamper(folder: Path, change: Callable[[Any, str, Any], object]) -> None:
    """Change DCP's own records, as its classes allow, and write them back."""
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    first = next(index for index in found.storage_data if index.fqn == "0.weight")
    change(found, "0.weight", found.storage_data[first])
    path.write_bytes(pickle.dumps(found))


def _set(target: str, value: Any) -> Callable[[Any, str, Any], object]:
    return lambda found, name, info: setattr(info, target, value)


def _disguised(found: Any, name: str, info: Any) -> None:
    """Make a path whose text is harmless and whose parts are not."""
    path = Path("/etc/passwd")
    path._str = "__0_0.distcp"  # type: ignore[attr-defined]
    info.relative_path = path


def _entry(**facts: Any) -> Callable[[Any, str, Any], object]:
    def change(found: Any, name: str, info: Any) -> None:
        for key, value in facts.items():
            setattr(found.state_dict_metadata[name], key, value)

    return change


def _chunks(found: Any, name: str, info: Any) -> None:
    entry = found.state_dict_metadata[name]
    entry.chunks = entry.chunks * 2


def _huge(found: Any, name: str, info: Any) -> None:
    entry = found.state_dict_metadata[name]
    entry.size = entry.chunks[0].sizes = torch.Size([1 << 30, 1 << 10])


def _holed(found: Any, name: str, info: Any) -> None:
    found.state_dict_metadata[name].size = torch.Size([1 << 20, 1 << 18])


def _aliased(found: Any, name: str, info: Any) -> None:
    index = next(i for i in found.storage_data if i.fqn == name)
    for number in range(2000):
        found.state_dict_metadata[f"x{number}"] = found.state_dict_metadata[name]
        found.storage_data[type(index)(f"x{number}", index.offset)] = info


TAMPERED: dict[str, Callable[[Any, str, Any], object]] = {
    "a file above": _set("relative_path", "../aside"),
    "an absolute file": _set("relative_path", "/etc/passwd"),
    "a hidden file": _set("relative_path", ".metadata"),
    "a file with a NUL": _set("relative_path", "a\0b"),
    "a file of no name": _set("relative_path", ""),
    "a file that is a number": _set("relative_path", 5),
    "a file that is a path": _set("relative_path", Path("__0_0.distcp")),
    "a path in disguise": _disguised,
    "an offset below 0": _set("offset", -1),
    "an offset of 2**60": _set("offset", 1 << 60),
    "an offset that is text": _set("offset", "0"),
    "a length of 2**60": _set("length", 1 << 60),
    "a length below 0": _set("length", -1),
    "a length of 1": _set("length", 1),
    "an extension": _set("transform_descriptors", ["zstd"]),
    "a size of a terabyte": _huge,
    "a size beyond the chunks": _holed,
    "a size below 0": _entry(size=(-1, 8)),
    "a size of texts": _entry(size=("a", "b")),
    "a size of 1,000 dimensions": _entry(size=(1,) * 1000),
    "chunks that are none": _entry(chunks=5),
    "no chunks": _entry(chunks=[]),
    "a chunk twice": _chunks,
    "properties that are none": _entry(properties=None),
    "one piece under 2,000 names": _aliased,
    "no storage": lambda found, name, info: setattr(found, "storage_data", None),
    "storage that is a list": lambda found, name, info: setattr(found, "storage_data", [1]),
    "no tensors": lambda found, name, info: setattr(found, "state_dict_metadata", None),
    "names that are numbers": lambda found, name, info: setattr(
        found, "state_dict_metadata", {1: found.state_dict_metadata[name]}
    ),
    "an index that is text": lambda found, name, info: setattr(found, "storage_data", {"x": info}),
}


def all_foreign() -> list[Foreign]:
    return [case for make in (torch_files, safetensors_files, dcp_folders) for case in make()]
