"""Entry of the `thrifty` command: `python -m thrifty` does the same."""

from thrifty.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
