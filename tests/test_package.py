"""The package itself: quick to import, whole in its wheel, and silent about who built it where."""

import re
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import everlong

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_is_quick_and_loads_nothing_heavy() -> None:
    timed = "import time; t = time.perf_counter(); import everlong; print(time.perf_counter() - t)"
    assert statistics.median(float(python(timed)) for _ in range(5)) < 0.1
    loaded = python("import sys, everlong; print(*sys.modules)").split()
    heavy = {"torch", "transformers", "numpy", "accelerate", "matplotlib", "rich", "cyclopts"}
    assert heavy.isdisjoint(loaded)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    source = ROOT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in (source / "everlong").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= set(wheel.namelist())
    assert {
        "everlong/py.typed",
        "everlong/data/moby_dick.txt.xz",
        "everlong/data/sotu.tar.xz",
        "everlong/data/README.md",
        "everlong/data/provenance.toml",
    } <= files


def test_the_wheel_holds_the_package_alone_and_stays_small(wheel: zipfile.ZipFile) -> None:
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert folders == {"everlong", f"everlong-{everlong.__version__}.dist-info"}
    assert sum(entry.compress_size for entry in wheel.infolist()) < 5_000_000


MINIMAL = """
import sys
sys.modules |= dict.fromkeys(
    ("lm_eval", "datasets", "peft", "trackio", "tensorboard", "fla", "titans_pytorch")
)  # None: cannot be imported
sys.path.insert(0, ".")
import everlong
from everlong.cli import main
print(everlong.__file__)
assert main(["train", "smoke", "--dry-run"]) == 0
for track in ("trackio", "tensorboard"):
    assert main(["train", "smoke", "--track", track]) == 2
"""


def test_the_wheel_unpacked_works_without_extras_and_names_the_one_that_is_missing(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    entry = tmp_path / f"everlong-{everlong.__version__}.dist-info" / "entry_points.txt"
    assert "everlong = everlong.cli:main" in entry.read_text()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MINIMAL], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(tmp_path)
    assert done.stderr.count("pip install 'everlong[track]'") == 2


def test_dependencies_have_floors_and_no_caps(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(f"everlong-{everlong.__version__}.dist-info/METADATA").decode()
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert any(line.startswith("torch>=") for line in required)
    assert not [line for line in required if "<" in line or "==" in line.split(";")[0]]


def test_constraints_pin_a_torch_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()
    assert "torch>=2.11" in project["dependencies"]


def test_no_path_of_a_machine_is_in_the_repository() -> None:
    places = "|".join(("root", "work", "home/[a-z]", "Users/[a-zA-Z]"))
    path = re.compile(rf"(?<![\w.~}}/-])/(?:{places})[\w-]*/")
    folders = ("src", "tests", "docs", "benchmarks", ".ci")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")]
    files += ROOT.iterdir()
    found = []
    for file in files:
        if not file.is_file() or file.suffix in {".xz", ".pyc", ".png", ".safetensors"}:
            continue
        text = file.read_text("utf-8")
        found += [f"{file.relative_to(ROOT)}: {match}" for match in path.findall(text)]
    assert path.search(f"see /{'home'}/ada/x")
    assert not found
