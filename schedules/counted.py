"""A number of things, as people say it."""


def counted(number: int, thing: str) -> str:
    """Write ``1 row``, ``2 rows``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
