"""This rank's random-number generators: those of Python, NumPy, torch on the CPU, and torch on every CUDA device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomState:
    """This process's random-number generators, as an object with `state_dict` and `load_state_dict`.

    What has not been used here is left out: CUDA is not initialized for it.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states as arrays, tensors and plain values.

        Ranks: any.
        """
        version, words, gauss = random.getstate()
        spare = np.array([gauss is not None, gauss or 0.0])  # [whether there is one, the second of a pair of normals]
        state: dict[str, Any] = {
            "python": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": spare},
            "numpy": _numpy_state(),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generators; CUDA devices that are not here, and generators that were not saved, are passed over.

        Ranks: any.
        """
        python = state["python"]
        is_set, gauss = python["gauss"].tolist()
        words = tuple(python["words"].tolist())
        random.setstate((python["version"], words, gauss if is_set else None))
        np.random.set_state(_from_state(state["numpy"]))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for device, device_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(device_state, device)


def _numpy_state() -> dict[str, Any]:
    """Return NumPy's state with all that changes in arrays: so its plain values are the same at every save."""
    state: dict[str, Any] = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return state
    place = np.array([state["state"]["pos"], state["has_gauss"]])
    return {
        "bit_generator": "MT19937",
        "key": state["state"]["key"],
        "place": place,
        "gauss": np.array([state["gauss"]]),
    }


def _from_state(saved: dict[str, Any]) -> dict[str, Any]:
    if saved["bit_generator"] != "MT19937":
        return saved
    position, has_gauss = saved["place"].tolist()
    return {
        "bit_generator": "MT19937",
        "state": {"key": saved["key"], "pos": position},
        "has_gauss": has_gauss,
        "gauss": saved["gauss"].item(),
    }
