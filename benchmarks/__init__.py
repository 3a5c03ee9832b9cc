"""Benchmarks: distckpt beside its peers and beside what the disk and the memory can do, in the same interleaved run.

    make bench                        every benchmark, at a moderate size
    make bench ARGS="--size full"     with the larger states
    python -m benchmarks.local_save   one of them
    python -m benchmarks.summary      what the newest results say of every target
    python -m benchmarks.plots        pictures of them
    benchmarks/gpu.sh                 what is worth measuring on one NVIDIA GPU

Rooms: `states` (what is saved), `training` (steps, with and without a save beside them), `ceilings` (what the machine
can do), `contenders` (who saves), `rounds` (who runs when, and whether to believe it), `targets` (what distckpt should
reach), `report` (tables and JSON lines), `machine` (what it was measured on), `kernel` (the kernel's own counters),
`staged` and `hashed` (what is counted in a library from outside), `disk`, `team`, `options`.
Invariant: whoever is measured ends with bytes on the disk, not in the page cache, and "cold" is what the kernel says.
"""
