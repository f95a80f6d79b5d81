"""`everlong show`: one memory, its options and what they default to."""

import dataclasses
import inspect


def show(name: str) -> None:
    """One memory: what it writes, keeps and forgets, its options, its bytes of state.

    Parameters
    ----------
    name
        A name from `everlong list`.
    """
    from everlong.evaluation.cost import memory_row
    from everlong.registry import memory_entry

    entry, row = memory_entry(name), memory_row(name)
    grows = "" if entry.bounded else " when fresh; it grows with the stream"
    print(f"{name} ({entry.room}/), {entry.paper}\n")
    print(inspect.getdoc(entry.cls) or entry.keeps)
    print(f"\nBytes of state of one stream at width 256: {row['bytes']:,}{grows}.")
    print(f"\nOptions (`--set model.{_place(entry)}.KEY=VALUE`, or in a recipe):")
    for field in dataclasses.fields(entry.config):
        print(f"  {field.name} = {_default(field)}")
    about = inspect.getdoc(entry.config)
    if about:
        print(f"\n{about}")


def _place(entry) -> str:
    return "segment" if entry.room == "segments" else f"mixers.{entry.name}"


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "(the model's)"
