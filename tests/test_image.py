"""The image and the offline install: what they do to an environment that has its torch already, without Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
BUILT_FOR_IT = "2.10.0a0+b4e4ee81d3"  # as a container calls its torch
Process = subprocess.CompletedProcess[str]


def instructions(name: str) -> list[str]:
    """What follows each RUN, ENV, ... of the Dockerfile."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} +(.+)$", joined, re.MULTILINE)


def _context(to: Path) -> Path:
    """What .dockerignore lets into a build."""
    to.mkdir(exist_ok=True)
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "nothing by default"
    for name in (line.removeprefix("!") for line in lines if line.startswith("!")):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    return to


def _base(folder: Path, torch_wheel: Path | None = None) -> Path:
    """The Python of an environment as a container's: its torch is there (this one's, or of a wheel), an older numpy is
    held fast, and pip is all else."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python3"
    [site] = (folder / "lib").glob("python*/site-packages")
    if torch_wheel is not None:
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", torch_wheel], check=True)
        return python
    import torch

    ours = Path(torch.__file__).parents[1]
    for part in [*ours.glob("torch-*.dist-info"), *(ours / name for name in ("torch", "torchgen", "functorch"))]:
        (site / part.name).symlink_to(part)
    subprocess.run([python, "-m", "pip", "install", "-q", "numpy==1.26.4"], check=True)
    return python


def _held(folder: Path) -> Path:
    """A file for PIP_CONSTRAINT: what is tested, but for a numpy as containers have it, and what goes with that."""
    tested = (REPOSITORY / "constraints.txt").read_text().splitlines()
    lines = [
        "numpy==1.26.4",
        *(line for line in tested if not line.startswith(("numpy==", "pandas==", "pyarrow==", "torch=="))),
    ]
    path = folder / "constraint.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def _shell(command: str, python: Path, cwd: Path, *, network: bool = True, **variables: str) -> Process:
    """Of an environment, as bash runs a command in it; where this user may, in a namespace without a network."""
    left_out = ("PYTHONPATH", "PYTHON")  # the second is what `make PYTHON=...` hands down
    given = {name: value for name, value in environment().items() if name not in left_out}
    variables |= {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    # A node without a network has itself: gloo asks for the loopback interface even of one process.
    alone = ["unshare", "--net", "bash", "-c", 'ip link set lo up && "$@"', "alone"]
    if network or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        alone = []
    return subprocess.run(
        [*alone, "bash", "-c", command], cwd=cwd, env=given | variables, capture_output=True, text=True, check=False
    )


def _torch_of(python: Path) -> tuple[str, list[str]]:
    """Its version, and the files that say which build it is."""
    ask = "import importlib.metadata as m; print(m.version('torch')); print(m.distribution('torch').locate_file('.'))"
    version, site = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    return version, sorted(f"{path.name} {os.stat(path).st_ino}" for path in Path(site).glob("torch*"))


def _tool_runs(python: Path, folder: Path) -> None:
    folder.mkdir()
    done = _shell("python3 -m compress recipe=tiny name=it", python, folder, network=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "it" / "evaluate" / "metrics.json").exists()


def _make(folder: Path, name: str, files: dict[str, str], metadata: str) -> Path:
    """A wheel of a few files."""
    [project, version] = name.split("-")
    folder.mkdir(exist_ok=True)
    path, info = folder / f"{name}-py3-none-any.whl", f"{name}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in {
            **files,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n{metadata}",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        }.items():
            archive.writestr(inside, text)
    return path


def test_the_linter_finds_nothing() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", REPOSITORY / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_pinned_and_the_user_is_nobody_special() -> None:
    [base, *_] = instructions("ARG")
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert instructions("FROM") == ["${BASE} AS wheel", "${BASE}"]
    [user] = instructions("USER")
    assert int(user) > 0
    assert f"--uid {user} " in " ".join(instructions("RUN"))
    assert 'org.opencontainers.image.revision="${REVISION}"' in " ".join(instructions("LABEL"))


def test_the_build_sees_nothing_but_what_the_wheel_is_made_of(tmp_path: Path) -> None:
    context = _context(tmp_path)
    assert {path.name for path in context.iterdir()} == {
        "pyproject.toml", "README.md", "LICENSE", "compress", "conf", "launch",
    }  # fmt: skip


def test_an_environment_without_torch_is_left_as_it_is(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python3"
    done = _shell(f"{REPOSITORY}/launch/install.sh x.whl", python, tmp_path)
    assert done.returncode == 1
    assert f"there is no torch in {tmp_path / 'bare'}: install the build that fits this machine" in done.stderr


@pytest.mark.slow
def test_a_wheel_that_asks_for_another_torch_is_refused_and_torch_stays(tmp_path: Path) -> None:
    torch_wheel = _make(tmp_path, f"torch-{BUILT_FOR_IT}", {"torch/__init__.py": ""}, "")
    python = _base(tmp_path / "base", torch_wheel)
    _make(tmp_path / "newer", "torch-3.0", {"torch/__init__.py": ""}, "")
    wheel = _make(tmp_path, "compress-9.0", {"compress/__init__.py": ""}, "Requires-Dist: torch>=2.11\n")
    before = _torch_of(python)
    install = f"{REPOSITORY}/launch/install.sh"
    done = _shell(f"{install} {wheel} --no-index --find-links={tmp_path}/newer", python, tmp_path)
    assert done.returncode == 1
    assert "compress 9.0 depends on torch>=2.11" in done.stdout + done.stderr
    assert BUILT_FOR_IT in done.stdout + done.stderr
    assert _torch_of(python) == before
    wheel = _make(tmp_path, "compress-9.1", {"compress/__init__.py": ""}, "Requires-Dist: torch>=2.9\n")
    done = _shell(f"{install} {wheel} --no-index --find-links={tmp_path}/newer", python, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"kept torch {BUILT_FOR_IT}" in done.stdout
    assert _torch_of(python) == before


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the Dockerfile's own step, of what its build sees."""
    folder = tmp_path_factory.mktemp("image")
    context, wheels = _context(folder / "src"), folder / "wheels"
    step = instructions("RUN")[0]
    assert step.endswith("--wheel-dir /wheels .")
    python = _base(folder / "base")
    done = _shell(step.replace("/wheels", str(wheels)), python, context)
    assert done.returncode == 0, done.stderr
    [found] = wheels.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_images_steps_keep_the_bases_torch_and_numpy_and_end_in_a_tool_that_runs(
    wheel: Path, tmp_path: Path
) -> None:
    python = _base(tmp_path / "base")
    before = _torch_of(python)
    shutil.copy(REPOSITORY / "launch" / "install.sh", wheel.parent)
    saved = shutil.copytree(wheel.parent, tmp_path / "wheels")
    step = instructions("RUN")[1].replace("/wheels", str(saved))
    done = _shell(step, python, tmp_path, PIP_CONSTRAINT=str(_held(tmp_path)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not saved.exists()
    assert _torch_of(python) == before
    listed = _shell("python3 -m pip check; python3 -m pip list --format=freeze", python, tmp_path).stdout
    assert "No broken requirements found" in listed
    assert "numpy==1.26.4" in listed
    _tool_runs(python, tmp_path / "work")


@pytest.mark.slow
def test_what_is_gathered_where_there_is_a_network_is_enough_where_there_is_none(wheel: Path, tmp_path: Path) -> None:
    gathering, node = _base(tmp_path / "login"), _base(tmp_path / "node")
    command = f"{REPOSITORY}/launch/offline.sh {tmp_path}/bundle {wheel} --constraint {_held(tmp_path)}"
    done = _shell(command, gathering, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wheels = [path.name for path in (tmp_path / "bundle" / "wheels").iterdir()]
    assert not [name for name in wheels if name.startswith(("torch-", "nvidia"))]
    again = _shell(command, gathering, tmp_path)
    assert again.returncode == 1
    assert "bundle is there already" in again.stderr
    moved = shutil.copytree(tmp_path / "bundle", tmp_path / "elsewhere")
    before = _torch_of(node)
    done = _shell(f"{moved}/install.sh", node, tmp_path, network=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _torch_of(node) == before
    _tool_runs(node, tmp_path / "work")
    broken = moved / "wheels" / sorted(wheels)[0]
    broken.write_bytes(broken.read_bytes()[:-1])
    done = _shell(f"{moved}/install.sh", node, tmp_path, network=False)
    assert done.returncode != 0
    assert f"wheels/{broken.name}: FAILED" in done.stdout + done.stderr
