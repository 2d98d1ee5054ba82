"""``python -m opcompile``."""

from opcompile.cli import main

if __name__ == "__main__":
    main()
