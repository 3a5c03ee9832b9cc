"""HTML, built from parts: what is not `Markup` is text, and is escaped.

Invariant: only this module and the page's own style and script make `Markup` from text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

_EMPTY = frozenset({"img", "meta"})
_INVISIBLE = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "�")
# What turns the direction of the text around it would let a name disguise its neighbours.
_INVISIBLE |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\N{REPLACEMENT CHARACTER}")
_IN_SCRIPT = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", 0x2028: "\\u2028", 0x2029: "\\u2029"}


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Return text as HTML that shows it; what is HTML already stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(_sound(text)))


def join(parts: Iterable[str | None], separator: str = "") -> Markup:
    """Return parts one after another; None is left out."""
    return Markup(escape(separator).join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """Return an element.

    Args:
        name: The element's name.
        children: What stands in it; None is left out.
        attributes: Its attributes: `class_` is "class", `aria_label` "aria-label"; True has no value, False and None
            are left out.
    """
    shown = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in _EMPTY:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def _attribute(key: str, value: str | float | bool) -> str:
    if value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(_sound(str(value)))}"'


def data(value: Any) -> Markup:
    """Return JSON as an element that holds data for the page's script, and that no browser runs."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(f'<script type="application/json">{_sound(text).translate(_IN_SCRIPT)}</script>')


def _sound(text: str) -> str:
    """Return text without what is no character, or is one that hides others."""
    return text.translate(_INVISIBLE).encode("utf-8", "replace").decode()
