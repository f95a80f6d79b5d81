"""What every test runs under: no network, one thread, no hub, and assertions that explain."""

import os
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # float64 sums in one order; xdist fills the cores
sys.path.insert(0, str(Path(__file__).parent))  # so that tests share `laws.cases` and `laws.checks`
from supports import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401

for _name in ("cases", "streams", "rows", "bounds", "replays", "numbers", "honesty"):
    pytest.register_assert_rewrite(f"laws.{_name}")

_LOCAL = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A test that leaves this machine fails. Sockets to itself (process groups) are allowed."""
    connect = socket.socket.connect

    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else "127.0.0.1"  # a path: a local socket
        if not str(host).startswith(_LOCAL):
            raise AssertionError(f"a test opened a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


_SHRUNK = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile(
    "everlong",
    deadline=None,  # a loaded machine is not a bug
    derandomize=True,  # the same examples everywhere
    database=None,
    report_multiple_bugs=False,
    phases=_SHRUNK,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("unshrunk", settings.get_profile("everlong"), phases=_SHRUNK[:2])
settings.load_profile("everlong")
