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
        state: dict[str, Any] = {
            "python": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss},
            "numpy": np.random.get_state(legacy=False),
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
        random.setstate((python["version"], tuple(int(word) for word in python["words"]), python["gauss"]))
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for device, device_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(device_state, device)
