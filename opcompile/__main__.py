"""The entry point of the package, and ``python -m opcompile``."""

import sys


def main() -> None:
    """Run the command line. What loads an artifact needs neither click nor rich, and may stand without them."""
    try:
        from opcompile.cli import main as command_line
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        sys.exit(_said(f"the command line needs the package {package}, which is missing: pip install click rich", 3))
    except KeyboardInterrupt:
        sys.exit(_said("interrupted", 130))
    command_line()


def _said(message: str, code: int) -> int:
    print(f"opcompile: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
