"""Progress: how a run's saving stands, as a progress line shows it; and spans of time in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SPANS = ((60, "s", 1), (3600, "min", 60), (86_400, "h", 3600), (math.inf, "d", 86_400))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a run's saving stands at one moment, as this rank sees it; as text, words for a progress line.

    Attributes:
        saved_step: The newest step that is committed or was restored; None if there is none.
        saved_ago_s: How long ago this job committed it, in seconds; None if it did not.
        saving_step: The step whose save is in flight; None if none is.
        saving_bytes: How much this rank is to write for it.
        written_bytes: How much of that it has handed to the storage.
    """

    saved_step: int | None = None
    saved_ago_s: float | None = None
    saving_step: int | None = None
    saving_bytes: int = 0
    written_bytes: int = 0

    @property
    def saved_text(self) -> str:
        """The newest checkpoint: "saved 500, 12 s ago"; "" if there is none."""
        if self.saved_step is None:
            return ""
        if self.saved_ago_s is None:
            return f"restored {self.saved_step:,}"
        return f"saved {self.saved_step:,}, {span_text(self.saved_ago_s)} ago"

    @property
    def saving_text(self) -> str:
        """The save in flight: "saving 600: 43 %"; "" if there is none."""
        if self.saving_step is None:
            return ""
        if not self.saving_bytes:
            return f"saving {self.saving_step:,}"
        return f"saving {self.saving_step:,}: {100 * self.written_bytes // self.saving_bytes} %"

    def __str__(self) -> str:
        """Return both, as far as there are any."""
        return "; ".join(text for text in (self.saved_text, self.saving_text) if text)


def span_text(seconds: float) -> str:
    """Return a span of time in its largest unit: "3 min"."""
    seconds = max(0.0, seconds)
    unit, divisor = next((unit, divisor) for limit, unit, divisor in _SPANS if seconds < limit)
    return f"{seconds / divisor:.0f} {unit}"
