"""What a process did to the files below a folder, read from strace's log, and whether it would survive a power loss.

A system call has a beginning and an end in the log; a sync counts for what had ended before it began.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

TRACED = (
    "open,openat,creat,write,writev,pwrite64,pwritev,pwritev2,fallocate,ftruncate,copy_file_range,sendfile,splice,"
    "fsync,fdatasync,link,linkat,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,io_uring_setup"
)
STRACE = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "0", "-e", f"trace={TRACED}"]

_LINE = re.compile(r"(?P<pid>\d+) +(?P<text>.*)")
_RESUMED = re.compile(r"<\.\.\. (?P<verb>\w+) resumed>(?P<rest>.*)")
_CALL = re.compile(r"(?P<verb>\w+)\((?P<args>.*)\) += (?P<result>-?\d+)(?P<told><[^>]*>)?.*")
_FD = re.compile(r"(?:\d+|AT_FDCWD)<(?P<path>[^>]*)>(?:\(deleted\))?")
_NAME = re.compile(r'(?:(?:\d+|AT_FDCWD)<(?P<folder>[^>]*)>, )?"(?P<name>[^"]*)"')
_WRITES = {"write", "writev", "pwrite64", "pwritev", "pwritev2", "fallocate", "ftruncate"}
_COPIES = {"copy_file_range": 1, "sendfile": 0, "splice": 1}  # which of the files named is written to


@dataclass(frozen=True, kw_only=True)
class Call:
    """One system call that succeeded: its name, its text between the brackets, where it begins and ends in the log."""

    verb: str
    args: str
    begun: int
    ended: int
    opened: str | None = None

    @property
    def file(self) -> str:
        """The path of the first file that it was given as a number."""
        match = _FD.search(self.args)
        assert match is not None, self
        return match["path"]

    @property
    def names(self) -> list[str]:
        """The paths that it was given as names."""
        return [os.path.normpath(os.path.join(m["folder"] or "/", m["name"])) for m in _NAME.finditer(self.args)]  # noqa: PTH118


@dataclass(kw_only=True)
class Content:
    """One file's content, under whatever names: when it was last written to, and when its syncs began."""

    written: int | None = None
    syncs: list[int] = field(default_factory=list)

    def is_durable(self) -> bool:
        return self.written is None or any(begun > self.written for begun in self.syncs)


class Disk:
    """Files and folders below `base`, as far as the log has told of them."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.contents: dict[str, Content] = {}
        self.entries: dict[str, int] = {}  # when each name was given
        self.folder_syncs: dict[str, list[int]] = {}

    def apply(self, call: Call) -> None:
        """Let a call happen."""
        assert call.verb != "io_uring_setup", "what goes through io_uring is not seen here"
        if call.verb in ("open", "openat", "creat"):
            path = call.opened
            if path is not None and self._is_below(path) and path not in self.entries and "O_CREAT" in call.args:
                self.entries[path] = call.ended
                self.contents[path] = Content()
        elif call.verb in _WRITES or call.verb in _COPIES:
            paths = [match["path"] for match in _FD.finditer(call.args)]
            path = paths[_COPIES.get(call.verb, 0)]
            if path in self.contents:
                self.contents[path].written = call.ended
        elif call.verb in ("fsync", "fdatasync"):
            if call.file in self.contents:
                self.contents[call.file].syncs.append(call.begun)
            else:
                self.folder_syncs.setdefault(call.file, []).append(call.begun)
        elif call.verb.startswith(("link", "rename")):
            source, target = call.names
            if source in self.contents:
                self.contents[target], self.entries[target] = self.contents[source], call.ended
            if call.verb.startswith("rename"):
                self._forget(source)
        elif call.verb.startswith("mkdir"):
            if self._is_below(call.names[0]):
                self.entries[call.names[0]] = call.ended
        else:  # unlink, unlinkat, rmdir
            self._forget(call.names[0])

    def unsafe(self) -> list[str]:
        """Return, in words, what a power loss could take now; temporary names may go."""
        problems = []
        for path, given in sorted(self.entries.items()):
            if path.endswith(".tmp"):
                continue
            if path in self.contents and not self.contents[path].is_durable():
                problems.append(f"{path} was not synced after its last write")
            folder = os.path.dirname(path)  # noqa: PTH120
            if not any(begun > given for begun in self.folder_syncs.get(folder, [])):
                problems.append(f"{folder} was not synced after it got {os.path.basename(path)}")  # noqa: PTH119
        return problems

    def _is_below(self, path: str) -> bool:
        return path.startswith(f"{self.base}/")

    def _forget(self, path: str) -> None:
        self.contents.pop(path, None)
        self.entries.pop(path, None)


def calls(lines: Iterable[str]) -> Iterator[Call]:
    """Yield the calls that succeeded, in the order in which they ended."""
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines):
        match = _LINE.match(line)
        if match is None:
            continue
        pid, text, first = match["pid"], match["text"].rstrip(), number
        if text.endswith("<unfinished ...>"):
            begun[pid] = number, text.removesuffix("<unfinished ...>")
            continue
        resumed = _RESUMED.match(text)
        if resumed is not None:
            first, head = begun.pop(pid)
            text = head + resumed["rest"]
        call = _CALL.fullmatch(text)
        if call is not None and int(call["result"]) >= 0:
            opened = call["told"][1:-1] if call["told"] else None
            yield Call(verb=call["verb"], args=call["args"], begun=first, ended=number, opened=opened)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found: how many manifests and acknowledgements, files written, and what was unsafe at them."""

    num_manifests: int
    num_acknowledged: int
    files: list[str]
    problems: list[str]


def audit(lines: Iterable[str], base: str) -> Audit:
    """Check a log: all is durable when a manifest gets its name, and when a file acknowledged-... is made."""
    disk = Disk(base)
    problems: list[str] = []
    files: set[str] = set()
    num_manifests = num_acknowledged = 0
    for call in calls(lines):
        is_naming = call.verb.startswith(("link", "rename"))
        if is_naming and call.names[1].endswith("/manifest.json"):
            num_manifests += 1
            source = disk.contents.get(call.names[0])
            unsafe = disk.unsafe()
            if source is None or not source.is_durable():
                unsafe.append(f"{call.names[0]} was not synced")
            problems += [f"when {call.names[1]} appeared, {problem}" for problem in unsafe]
        disk.apply(call)
        files.update(path for path in disk.contents if not path.endswith(".tmp"))
        if call.opened is not None and "/acknowledged-" in call.opened:
            num_acknowledged += 1
            problems += [f"at {os.path.basename(call.opened)}, {problem}" for problem in disk.unsafe()]  # noqa: PTH119
    return Audit(num_manifests=num_manifests, num_acknowledged=num_acknowledged, files=sorted(files), problems=problems)
