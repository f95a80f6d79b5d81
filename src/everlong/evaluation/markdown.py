"""Tables as the pages of the docs have them."""

from collections.abc import Callable, Iterable, Mapping


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, ending in a newline; "None." where there is no row."""
    head, found = list(head), [list(row) for row in rows]
    lines = [head, ["---"] * len(head), *found] if found else []
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells) or "None.\n"


def marked(tables: Mapping[str, Callable[[], str]]) -> str:
    """Every table between the marks that a page has around it, ending in a newline."""
    return "\n".join(
        f"<!-- {name} -->\n{make()}<!-- /{name} -->\n" for name, make in tables.items()
    )
