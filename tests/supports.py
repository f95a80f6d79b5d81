"""What tests show of each memory, as data: `pytest -m supports --compatibility=FILE`.

A test marked `@pytest.mark.supports("generate: beams")` shows that of the memory named by its
parameter `name`; both may be templates of its parameters: `supports("law {law}", of="{name}")`.
It may tell more by `record_property("note", ...)`.

FILE holds "found", {memory or variant: {what: outcome}}, an outcome being "passed",
"passed: note", "skipped: reason" or "failed: reason" (the worst of the tests that show the same),
and "git", the commit each memory was found at. A memory of which anything ran at another commit is
written anew; memories of which nothing ran are left as they are.
"""

import json
from pathlib import Path

COMMAND = "pytest -m supports --compatibility=benchmarks/results/compatibility.json"
_RANK = ("passed", "skipped", "failed")


def pytest_addoption(parser):
    parser.addoption("--compatibility", metavar="FILE", type=Path, help="what tests show, as JSON")


def pytest_configure(config):
    path = config.getoption("compatibility")
    if path is not None and not hasattr(config, "workerinput"):  # of xdist: it hears all reports
        config.pluginmanager.register(_Found(path))


def pytest_collection_modifyitems(items):
    """A property of the test travels with its report, from xdist's workers too."""
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        for mark in item.iter_markers("supports"):
            (what,), of = mark.args, mark.kwargs.get("of", "{name}")
            told = ("supports", (of.format(**given), what.format(**given)))
            item.user_properties.append(told)


class _Found:
    def __init__(self, path):
        from everlong.provenance import git_sha

        self.path, self.found, self.git = path, {}, git_sha()

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        told = _outcome(report)
        for name, value in report.user_properties:
            if name == "supports":
                of, what = value
                before = self.found.setdefault(of, {}).get(what, told)
                self.found[of][what] = max(before, told, key=_rank)

    def pytest_sessionfinish(self):
        from everlong.provenance import write_results

        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        found, git = before.get("found", {}), before.get("git", {})
        for of, told in self.found.items():
            found[of] = (found[of] if git.get(of) == self.git else {}) | told
            git[of] = self.git
        found = {of: dict(sorted(found[of].items())) for of in sorted(found)}
        write_results(self.path, COMMAND, {}, found=found, git=dict(sorted(git.items())))


def _rank(told):
    return _RANK.index(told.partition(":")[0])


def _outcome(report):
    """The outcome and, in one line, why or what was noted."""
    if hasattr(report, "wasxfail"):
        return _told("failed", report.wasxfail.removeprefix("reason: "))
    if report.skipped:
        return _told("skipped", report.longrepr[2].removeprefix("Skipped: "))
    if report.failed:
        if crash := getattr(report.longrepr, "reprcrash", None):
            return _told("failed", crash.message)
        strict = str(report.longrepr).startswith("[XPASS")
        return _told("failed", "passes now: no xfail" if strict else "could not be run")
    return _told("passed", dict(report.user_properties).get("note", ""))


def _told(outcome, why):
    line = (why.strip().splitlines() or [""])[0][:200]
    return f"{outcome}: {line}" if line else outcome
