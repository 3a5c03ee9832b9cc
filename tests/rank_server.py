"""One rank of a `RankPool`: runs the functions that the test process names, each in a freshly reset process state.

Started as a script, by torchrun or by the pool itself; talks to the test process over a local socket only.
The rank never outlives the test process: when the socket closes, it is gone at once, whatever it was doing.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import logging
import os
import pickle
import queue
import random
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # public, though not in __all__

STACKS_SIGNAL = signal.SIGUSR2
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message of a rank."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A function to run, by name, and what surrounds the caller."""

    number: int
    module: str
    name: str
    arguments: bytes  # pickled (args, kwargs); read only once the caller's modules can be found
    path: Sequence[str]
    directory: str
    environment: Mapping[str, str | None]  # what differs from the environment that the rank was started in
    filters: Sequence[str]  # as pytest writes them: action:message:category


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came of a request: a pickled value, or a traceback and the pickled exception."""

    value: bytes | None = None
    trace: str | None = None
    error: bytes | None = None


def main(address: str, log: Path) -> None:
    """Serve until the test process says stop (an empty message) or goes away."""
    redirect_output(log)
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")

    store, _, _ = next(rendezvous("env://"))  # the one that the launcher keeps
    started_in = dict(os.environ)
    connection = connect(address)
    connection.send(Hello(rank=int(os.environ["RANK"]), pid=os.getpid()))
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, requests), daemon=True).start()
    gc.freeze()  # what importing torch left is never garbage; collecting after every request stays quick

    while message := requests.get():
        request = pickle.loads(message)
        reply = answer(request, store, started_in)
        connection.send(reply)
        del request, reply
        gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread that a test has left must not hold the pool's end


def redirect_output(log: Path) -> None:
    """Send everything that this process prints, from C++ as well, to its own file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def connect(address: str) -> Connection:
    """Return the connection to the test process."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(address)
        return Connection(peer.detach())


def listen(connection: Connection, requests: queue.SimpleQueue[bytes]) -> None:
    """Queue what arrives; end the whole process when the test process is gone."""
    while True:
        try:
            requests.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


def answer(request: Request, store: Any, started_in: Mapping[str, str]) -> Reply:
    """Run the request in a new process group; whatever it raises becomes the reply."""
    try:
        reset_process(request, started_in)
        function = find_function(request.module, request.name)
        args, kwargs = pickle.loads(request.arguments)
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"request-{request.number}", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        value = pickle.dumps(function(*args, **kwargs))
    except BaseException as error:  # noqa: BLE001  # SystemExit and KeyboardInterrupt are results too
        return Reply(trace=traceback.format_exc(), error=pickled_error(error))
    else:
        return Reply(value=value)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def reset_process(request: Request, started_in: Mapping[str, str]) -> None:
    """Take away what earlier requests changed, and take on what surrounds the caller."""
    forget_modules()
    sys.path[:] = [*request.path, *(entry for entry in sys.path if entry not in request.path)]
    os.chdir(request.directory)
    environment = {**started_in, **request.environment}
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(mode=False)
    torch.set_grad_enabled(mode=True)
    set_warning_filters(request.filters)


def forget_modules() -> None:
    """Have the repository's own modules imported anew, so that nothing they count or keep crosses to the next run."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        own = file.startswith(str(REPOSITORY)) and "site-packages" not in file  # the environment may be in here, too
        if own and name not in (__name__, "__main__"):
            del sys.modules[name]


def set_warning_filters(filters: Sequence[str]) -> None:
    """Apply pytest's filters: `action:message:category`, later ones first, the message a regular expression."""
    warnings.resetwarnings()
    for line in filters:
        action, message, category = (*line.split(":", 2), "", "")[:3]
        module, _, name = (category or "Warning").rpartition(".")
        kind = getattr(importlib.import_module(module or "builtins"), name)
        warnings.filterwarnings(action, message=message.strip(), category=kind)  # type: ignore[arg-type]


def find_function(module: str, name: str) -> Callable[..., Any]:
    """Return a module's function, or a method of its class, by name."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def pickled_error(error: BaseException) -> bytes | None:
    """Return an exception for the test process; None if it cannot travel."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001  # an exception's own pickling may raise anything
        return None
    return pickled


if __name__ == "__main__":
    # The classes of the messages must be those of the module that the test process imports, not of __main__.
    sys.path.insert(0, str(Path(__file__).parent))
    importlib.import_module("rank_server").main(sys.argv[1], Path(sys.argv[2]) / f"rank-{os.environ['RANK']}.log")
