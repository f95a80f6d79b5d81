"""`everlong list`: the table of memories, computed from the registry."""


def list_command(pattern: str = "*") -> None:
    """The memories everlong knows. Bytes of state are one stream's: width 256, default options.

    Parameters
    ----------
    pattern
        Names to show, with shell wildcards: "*net".
    """
    from rich.table import Table

    from everlong.cli.progress import console
    from everlong.evaluation.cost import memory_row
    from everlong.registry import list_memories, suggest

    names = list_memories(pattern)
    if not names:
        raise ValueError(f"no memory is called {pattern!r}{suggest(pattern, list_memories())}")
    table = Table(box=None, pad_edge=False)
    for column in ("name", "room", "bounded", "bytes", "paper", "keeps"):
        number = column == "bytes"
        table.add_column(column, justify="right" if number else "left", no_wrap=column == "name")
    for row in map(memory_row, names):
        size = f"{row['bytes']:,}" if row["bounded"] else "grows"
        bounded = "yes" if row["bounded"] else "no"
        table.add_row(row["name"], row["room"], bounded, size, row["paper"], row["keeps"])
    console().print(table)
