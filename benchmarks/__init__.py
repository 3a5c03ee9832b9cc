"""Benchmarks: distckpt beside its peers and beside what the disk and the memory can do, in the same interleaved run.

    make bench                        every benchmark, at a moderate size
    make bench ARGS="--size full"     with the larger states
    python -m benchmarks.local_save   one of them

Rooms: `states` (what is saved), `ceilings` (what the machine can do), `contenders` (who saves), `rounds` (who runs
when, and whether to believe it), `report` (tables and JSON lines), `kernel` (the kernel's own counters), `disk`.
Invariant: whoever is measured ends with bytes on the disk, not in the page cache, and "cold" is what the kernel says.
"""
