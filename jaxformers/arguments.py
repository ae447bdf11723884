"""Command-line arguments by tyro, its boxed complaints as the one line that all our errors are."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro


def parsed(
    verbs: Mapping[str, Callable[..., None]], argv: Sequence[str] | None, *, prog: str, description: str
) -> Callable[[], None]:
    """The verb that ``argv`` names, with its arguments, ready to be called.

    Arguments that do not fit end the process with code 2 and one line on standard error; ``--help`` with code 0.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):  # only while parsing: the verb itself runs afterwards
            return tyro.extras.subcommand_cli_from_dict(
                {name: _deferred(verb) for name, verb in verbs.items()}, prog=prog, description=description, args=argv
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        print(f"{prog}: error: {one_line(told.getvalue())}", file=sys.stderr)
        raise SystemExit(2) from None


def one_line(box: str) -> str:
    """What tyro says in its box, without the frame: its parts joined, and where the help is."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    inside = (re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in lines if not re.match(r"\s*[╭╰+]", line))
    parts = re.split(r"\n[─-]{4,}\n", "\n".join(inside))
    said = [" ".join(part.partition("\n\n")[0].split()) for part in parts]  # details follow an empty line
    help_at = re.search(r"(?:run:?|see) (.+--help)", said[-1])
    kept = [part for part in said if part and not part.startswith(("For full helptext", "Argument helptext"))]
    return "; ".join(kept) + (f" ({help_at[1]})" if help_at else "")


def _deferred(verb: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function of the same signature and documentation that returns the call instead of making it."""

    @functools.wraps(verb)
    def hold(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(verb, *args, **kwargs)

    return hold
