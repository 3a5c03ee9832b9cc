"""The house's own rules, as far as a machine can hold them; the floors are import-linter's."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "distckpt"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_FILE_LINES = 450
MOST_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def place(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text())):
            yield file, node


def documented_names(markdown: str) -> list[str]:
    """Return the names in the first column of the table under the heading "Public names"."""
    section = re.split(r"^#+ *Public names *$", markdown, maxsplit=1, flags=re.MULTILINE)
    if len(section) < 2:
        return []
    rows = re.split(r"^#", section[1], maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`(\w+)", cell)]


def test_the_readme_documents_exactly_the_public_names() -> None:
    documented = documented_names((ROOT / "README.md").read_text())
    public = importlib.import_module("distckpt").__all__
    undocumented, gone = sorted(set(public) - set(documented)), sorted(set(documented) - set(public))
    assert not undocumented, 'missing in the table under the README\'s heading "Public names"'
    assert not gone, "in the README's table, but not in distckpt.__all__"
    assert len(documented) == len(set(documented)), "a name stands in the README's table twice"


def test_every_public_name_is_there() -> None:
    distckpt = importlib.import_module("distckpt")
    assert [getattr(distckpt, name) for name in distckpt.__all__]
    assert set(distckpt.__all__) <= set(dir(distckpt))


@pytest.mark.parametrize(
    "command",
    [["-c", "import distckpt"], ["-c", "import distckpt.cli"], ["-m", "distckpt.cli", "ls", "--help"]],
    ids=["distckpt", "distckpt.cli", "ls --help"],
)
def test_torch_is_imported_only_when_it_is_needed(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if "import time:" in line}
    said = [line for line in run.stderr.splitlines() if "import time:" not in line]
    assert (run.returncode, said) == (0, [])
    assert "distckpt" in imported
    assert not imported & {"torch", "torchvision", "numpy.random", "s3fs"}


def test_a_restart_imports_neither_dcp_nor_clients_of_object_stores() -> None:
    said = "import sys, distckpt; distckpt.CheckpointManager('somewhere'); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", said],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    imported = set(run.stdout.split())
    assert "distckpt.commit" in imported
    assert not imported & {"torch.distributed.checkpoint", "s3fs", "aiobotocore", "obstore", "torchvision"}


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_every_module_says_what_it_holds(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_no_file_is_too_long_to_read_in_one_sitting(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MOST_FILE_LINES


def test_no_function_is_too_long_to_read_in_one_sitting() -> None:
    long = []
    for file, node in nodes():
        if not isinstance(node, Function) or node.end_lineno is None:
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        num_lines = node.end_lineno - body[0].lineno + 1 if body else 0
        if num_lines > MOST_FUNCTION_LINES:
            long.append(f"{place(file, node)} {node.name}: {num_lines} lines")
    assert not long


def upper_modules() -> list[Path]:
    """Return the modules of floors 3 to 5, from `ranks` up, less the entry points."""
    [floors] = [c["layers"] for c in project()["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    [third] = [index for index, floor in enumerate(floors) if "ranks" in floor.split()]
    upper = {name for floor in floors[1 : third + 1] for name in re.findall(r"\w+", floor)}
    return [file for file in MODULES if file.relative_to(PACKAGE).with_suffix("").parts[0] in upper]


def public_functions(body: list[ast.stmt], covered: str = "") -> Iterator[tuple[Function, str]]:
    """Give the public functions and methods with their docstrings; a method stands under its class's too."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, ast.get_docstring(node) or "")
        elif isinstance(node, Function) and not node.name.startswith("_"):
            decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
            if not decorators & {"property", "setter", "overload"}:
                yield node, f"{covered}\n{ast.get_docstring(node) or ''}"


@pytest.mark.parametrize("file", upper_modules(), ids=module_name)
def test_every_function_says_which_ranks_call_it(file: Path) -> None:
    functions = list(public_functions(ast.parse(file.read_text()).body))
    assert not [
        f"{place(file, f)} {f.name}" for f, text in functions if not re.search(r"^ *Ranks:", text, re.MULTILINE)
    ]


def is_executing(call: ast.Call) -> bool:
    """Whether a call can run what it reads."""
    name = ast.unparse(call.func)
    if name == "torch.load":
        return "weights_only=True" not in [ast.unparse(keyword) for keyword in call.keywords]
    if name in {"np.load", "numpy.load"}:
        return any(keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False" for keyword in call.keywords)
    refused = {"eval", "exec", "compile", "__import__", "marshal.loads", "os.system", "shelve.open", "joblib.load"}
    return name in refused or re.fullmatch(r"(\w*pickle|dill)\.(load|loads|Unpickler)", name) is not None


def test_nothing_that_is_read_can_be_executed() -> None:
    found = [place(file, node) for file, node in nodes() if isinstance(node, ast.Call) and is_executing(node)]
    hidden = [
        place(file, node)
        for file, node in nodes()
        if isinstance(node, ast.ImportFrom) and re.fullmatch(r"\w*pickle|dill|marshal|shelve|joblib", node.module or "")
    ]
    assert not found + hidden


@pytest.mark.parametrize(
    ("source", "executes"),
    [
        ("torch.load(file)", True),
        ("torch.load(file, weights_only=False)", True),
        ("torch.load(file, weights_only=True)", False),
        ("pickle.loads(data)", True),
        ("np.load(file, allow_pickle=True)", True),
        ("np.load(file, allow_pickle=False)", False),
        ("np.load(file)", False),
        ("eval(text)", True),
        ("model.eval()", False),
        ("torch.compile(model)", False),
    ],
)
def test_the_check_for_execution_knows_one_when_it_sees_it(source: str, executes: bool) -> None:
    expression = ast.parse(source, mode="eval").body
    assert isinstance(expression, ast.Call)
    assert is_executing(expression) == executes


def test_no_path_belongs_to_somebodys_machine() -> None:
    private = re.compile(r"(?<![\w:/.])/(home|root|Users|opt|work)/\w")
    texts = [(file, node) for file, node in nodes() if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [place(file, node) for file, node in texts if private.search(str(node.value))]


def test_every_dependency_is_pinned_for_the_tests() -> None:
    described = project()
    pins = [Requirement(line) for line in described["dependency-groups"]["dev"]]
    needed = {Requirement(line).name for line in described["project"]["dependencies"]}
    assert not [str(pin) for pin in pins if [clause.operator for clause in pin.specifier] != ["=="]]
    assert not needed - {pin.name for pin in pins}, "make test installs the pins alone"


def test_no_two_test_modules_have_one_name() -> None:
    """Pytest imports them all into one flat space, and so do the ranks."""
    found = [file.name for file in (ROOT / "tests").rglob("*.py") if file.name not in ("conftest.py", "__init__.py")]
    assert sorted(found) == sorted(set(found))
