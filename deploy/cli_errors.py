"""How commands tell what the user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from router.errors import MoefleetError


@contextmanager
def told_errors() -> Iterator[None]:
    """Tell what the user can mend in one line, without a traceback, and end with exit status 2."""
    try:
        yield
    except (MoefleetError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
