"""`python -m textmeta` is the command `textmeta`."""

from textmeta.cli import main

main()
