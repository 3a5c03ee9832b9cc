"""Arguments: checks of what a caller hands in, with one wording for all.

Invariant: a refused argument is named, with what it must be and what it is.
"""

from __future__ import annotations

import math
from typing import Any, get_args

from distckpt.errors import ConfigError


def check_choice(owner: str, choices: Any, **arguments: object) -> None:
    """Refuse an argument that is none of the choices.

    Args:
        owner: Whose arguments they are.
        choices: A `Literal` of strings.
        **arguments: The arguments, by name.

    Raises:
        ConfigError: One is none of the choices.
    """
    allowed = get_args(choices)
    for name, value in arguments.items():
        if value not in allowed:
            *most, last = (f'"{choice}"' for choice in allowed)
            raise ConfigError(source=owner, problem=f"{name} must be {', '.join(most)} or {last}, is {value!r}")


def check_above_zero(owner: str, **arguments: float | None) -> None:
    """Refuse an argument that is not above 0, or is infinite; None is left to its owner.

    Args:
        owner: Whose arguments they are.
        **arguments: The arguments, by name.

    Raises:
        ConfigError: One is out of range.
    """
    for name, value in arguments.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(source=owner, problem=f"{name} must be above 0 and finite, is {value!r}")
