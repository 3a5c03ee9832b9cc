"""Train an image classifier; start it again, and it goes on where it was.

    python train.py                                   the digits, alone
    torchrun --nproc_per_node=8 train.py --config configs/imagefolder.yaml --train.epochs 90

Settings come from a YAML file and from the command line, which wins: `python train.py --help` lists them all.
The exit code is 0 if the run is complete or was asked to stop and has saved, 75 if only ranks of other machines were
asked to, so that torchrun goes on with the machines that are left, 2 if a setting is wrong, else 1.
"""

from __future__ import annotations

import os
import sys
import time

from distckpt import prefetch, trainer
from distckpt.errors import ConfigError, DistckptError
from distckpt.trainer.recall import EXIT_CODE, LINGER_S

IS_FIRST_RANK = os.environ.get("RANK", "0") == "0"


def main() -> int:
    """Train as the command line says, and return the exit code."""
    trainer.show_messages()
    try:
        config = trainer.parse_config(sys.argv[1:])
        where = config.checkpoint
        # While torch is imported, the newest checkpoint comes from the disk.
        with prefetch(where.directory, storage_options=where.storage_options, memory_tier=where.memory_tier):
            from distckpt.trainer import Trainer
        result = Trainer(config).fit()
    except ConfigError as error:
        return complain(str(error).replace("\nFix: ", "; "), code=2)
    except DistckptError as error:
        return complain(f"{type(error).__name__}: {error}", code=1)
    if IS_FIRST_RANK and result.complete and result.evaluation is not None:
        trainer.print_classes(result.evaluation, result.classes)
    if result.recalled:
        time.sleep(LINGER_S)  # a signal for this machine, too, ends the process here
        return EXIT_CODE
    return 0


def complain(message: str, *, code: int) -> int:
    """Print what went wrong, once for all ranks, and return the exit code."""
    if IS_FIRST_RANK:
        print(f"train.py: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
