"""Pages with parts that results write: everything between `<!-- KIND NAME -->` and `<!-- end KIND -->` is replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from phyxdream.bench.results import ResultsError
from phyxdream.errors import suggest


def fill(text: str, kind: str, blocks: Mapping[str, Callable[[Any], str]], found: Any) -> str:
    """`text` with every marked block of a kind made anew from `found`; `ResultsError` for a name not in `blocks`."""

    def block(match: re.Match) -> str:
        name = match[2]
        if name not in blocks:
            raise ResultsError(f"unknown block {name!r}{suggest(name, blocks)} (known: {', '.join(blocks)})")
        return f"{match[1]}{blocks[name](found)}\n{match[3]}"

    return re.sub(rf"(<!-- {kind} (\w+) -->\n).*?(<!-- end {kind} -->)", block, text, flags=re.DOTALL)


def rewrite(pages: Iterable[Path], update: Callable[[str], str], check: bool) -> int:
    """Put every page through `update`, and say what became of it; returns an exit code. With `check` nothing is
    written, and a page that would change is a failure.

    Raises:
        OSError: a page cannot be read or written; ResultsError: as `update` raised it, of which page.
    """
    stale = 0
    for page in pages:
        old = page.read_text(encoding="utf-8")
        try:
            new = update(old)
        except ResultsError as error:
            raise ResultsError(f"{page}: {error}") from error
        if check:
            stale += new != old
            print(f"{page}: {'differs from' if new != old else 'agrees with'} the results")
        elif new != old:
            page.write_text(new, encoding="utf-8")
            print(f"{page}: written")
        else:
            print(f"{page}: nothing has changed")
    return 1 if stale else 0
