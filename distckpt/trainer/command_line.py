"""From a YAML file and the command line to a `TrainConfig`.

Invariant: first the file, then the overrides, then the ranges are checked; whatever is wrong is a one-line
`ConfigError` that names its source and, for an unknown key, a near one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from distckpt.errors import ConfigError
from distckpt.retention import Retention
from distckpt.trainer.config import TrainConfig, check

COMMAND_LINE = "command line"


def parse_config(arguments: Sequence[str]) -> TrainConfig:
    """Return the settings that a command line asks for.

    Args:
        arguments: What follows the program's name, such as ["--config", "configs/digits.yaml", "--seed", "1"].

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value has the wrong type or is out of range.
        SystemExit: Help was asked for; it has been printed.
    """
    parser = _parser()
    path = _config_path(arguments)
    from_file = {} if path is None else _read(path, parser)
    overrides = _overrides(arguments, parser)
    config: TrainConfig = _build(TrainConfig, _merged(from_file, overrides), path or COMMAND_LINE)
    given = set(_leaves(overrides, ""))
    check(config, lambda key: COMMAND_LINE if path is None or key in given else path)
    return config


def _parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        description="Train an image classifier, resumably.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=str, help="YAML file with any of the settings below")
    parser.add_class_arguments(TrainConfig)
    return parser


def _config_path(arguments: Sequence[str]) -> str | None:
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    early.add_argument("--config", action="append", default=[])
    try:
        found: list[str] = early.parse_known_args(list(arguments))[0].config
    except argparse.ArgumentError as error:
        raise ConfigError(source=COMMAND_LINE, problem="--config needs the path of a YAML file") from error
    if len(found) > 1:
        raise ConfigError(source=COMMAND_LINE, problem=f"--config is given {len(found)} times; one file is read")
    return found[0] if found else None


def _read(path: str, parser: jsonargparse.ArgumentParser) -> dict[str, Any]:
    """Return what the YAML file sets, nested, with every value of its field's type."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else "is no UTF-8 text"
        raise ConfigError(source=path, problem=f"cannot be read: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(source=path, problem=f"is no YAML: {_one_line(str(error))}") from error
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ConfigError(source=path, problem="must hold sections such as model: and train:")
    for key in _unknown(TrainConfig, found, ""):
        raise ConfigError(source=path, problem=_complaint(key))
    try:
        parsed = parser.parse_object(dict(found), defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(source=path, problem=_translate(str(error))) from error
    return {name: value for name, value in parsed.items() if name != "config"}


def _overrides(arguments: Sequence[str], parser: jsonargparse.ArgumentParser) -> dict[str, Any]:
    """Return what the command line sets, nested."""
    try:
        parsed = parser.parse_args(list(arguments), defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(source=COMMAND_LINE, problem=_translate(str(error))) from error
    return {name: value for name, value in parsed.items() if name != "config"}


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Return `lower` with the values of `upper` laid over it."""
    both = dict(lower)
    for name, value in upper.items():
        below = both.get(name)
        both[name] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return both


def _build(kind: type[Any], values: Mapping[str, Any], source: str) -> Any:
    """Return a dataclass from nested mappings."""
    sections = _sections(kind)
    made = {
        name: _build(sections[name], value, source) if name in sections else value for name, value in values.items()
    }
    if isinstance(keep := made.get("keep"), Mapping):
        try:
            made["keep"] = Retention(**keep)
        except ConfigError as error:
            raise ConfigError(source=source, problem=f"checkpoint.keep: {error.source} {error.problem}") from error
    if "betas" in made:
        made["betas"] = tuple(made["betas"])
    return kind(**made)


def _sections(kind: type[Any]) -> dict[str, type[Any]]:
    hints = typing.get_type_hints(kind)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) and isinstance(hint, type)}


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")


def _known_keys(kind: type[Any], prefix: str = "") -> Iterator[str]:
    sections = _sections(kind)
    for item in dataclasses.fields(kind):
        if item.name in sections:
            yield from _known_keys(sections[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def _unknown(kind: type[Any], values: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    """Yield the complaint about each key, or section, that `kind` does not have."""
    sections = _sections(kind)
    names = {item.name for item in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in names:
            yield f"{prefix}{name}"
        elif name in sections:
            if not isinstance(value, Mapping):
                yield f"{prefix}{name}:"
            else:
                yield from _unknown(sections[name], value, f"{prefix}{name}.")
        elif name == "keep" and isinstance(value, Mapping):
            yield from _unknown(Retention, value, f"{prefix}{name}.")


def _complaint(key: str) -> str:
    """Return one line about a key that is not known, with a near one; a final colon means a section without keys."""
    if key.endswith(":"):
        return f"{key[:-1]} must be a section with keys of its own"
    keep = "checkpoint.keep"
    known = [*_known_keys(TrainConfig), *(f"{keep}.{item.name}" for item in dataclasses.fields(Retention))]
    known += ["config", *_sections(TrainConfig)]
    near = difflib.get_close_matches(key, known, n=1) or [
        full for full in known if full.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "; --help lists all keys")


def _translate(message: str) -> str:
    """Return the parser's many lines as one."""
    if (found := re.search(r"unrecognized arguments: (.*)", message)) is not None:
        first = found[1].split()[0]
        if not first.startswith("--"):
            return f"unexpected argument {first}; settings are given as --section.key value"
        return _complaint(first[2:].partition("=")[0])
    if (found := re.search(r'Parser key "([^"]+)":', message)) is not None:
        key, value = found[1], re.search(r"(?:Given value|Got value): (.*)", message)
        given = f", is {value[1]!r}" if value is not None else ""
        return f"{key} must be {_type_of(key)}{given}"
    if (found := re.search(r"argument --(\S+): expected one argument", message)) is not None:
        return f"{found[1]} needs a value"
    return _one_line(message)


def _type_of(key: str) -> str:
    """Return the type of a field as a user writes it."""
    kind: type[Any] = TrainConfig
    *sections, name = key.split(".")
    for section in sections:
        kind = _sections(kind).get(section, Retention)
    types = {item.name: str(item.type) for item in dataclasses.fields(kind)}
    text = types.get(name, "a value of another type")
    if text.startswith("Literal["):
        return "one of " + text[len("Literal[") : -1].replace('"', "")
    words = {"None": "null", "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    words |= {"Retention": "a mapping of last, best, metric, mode, every, within_s", "dict[str, Any]": "a mapping"}
    words |= {"tuple[float, float]": "two numbers"}
    return " or ".join(words.get(part, part) for part in text.split(" | "))


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
