"""`python -m textmeta` is the command `textmeta`."""

from textmeta.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
