"""`everlong env`: what a bug report needs."""


def env() -> None:
    """Versions and hardware, for a bug report."""
    from everlong.provenance import environment

    for name, value in environment().items():
        print(f"{name}: {value}")
