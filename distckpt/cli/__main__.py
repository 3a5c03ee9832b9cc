"""`python -m distckpt.cli` is `distckpt`."""

from distckpt.cli import main

main()
