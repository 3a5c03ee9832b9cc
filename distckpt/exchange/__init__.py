"""Exchange: checkpoints in the formats of other tools, out (`export`) and in (`take_in`).

Invariant: what is exported is read through its digests, appears under its name whole or not at all, and replaces
nothing; what is taken in runs no code, and is committed like any save.
"""

from distckpt.exchange.chosen import Chosen, choose

__all__ = ["Chosen", "choose"]
