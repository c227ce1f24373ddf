"""The doctor finds what a run would fail by, on real files, ports, networks and ranks; and says what to do."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import FAKETIME, FAST, REPOSITORY, Command, Run, environment, needs_faketime
from distributed import free_port, torchrun

from compress import agreement
from compress.artifacts import fingerprint_path
from compress.config import load_config
from compress.doctor import report
from compress.errors import CompressError, ConfigError
from compress.fitness import CHECKS, Line, Subject, Verdict, accelerator, attention, memory
from compress.parallel import available_bytes
from compress.plan import needs


def subject(cache: Path, run_dir: Path, *settings: str, ranks: int = 1) -> Subject:
    return Subject(load_config(*FAST, f"cache_dir={cache}", f"run_dir={run_dir}", *settings), run_dir, ranks, ranks)


def lines(text: str) -> dict[str, tuple[str, str]]:
    """Verdict and finding by check, of what the doctor printed."""
    found = re.findall(r"^(pass|warn|fail)  (.{20})  (.*)$", text, re.MULTILINE)
    return {check.strip(): (verdict, said) for verdict, check, said in found}


def test_a_fit_machine_passes_and_nothing_is_left_behind(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("stage=doctor", f"run_dir={tmp_path / 'new' / 'run'}")
    found = lines(capsys.readouterr().out)
    assert list(found) == list(CHECKS)
    assert {verdict for verdict, _ in found.values()} == {"pass"}
    assert re.match(r"Python 3\.\d+\.\d+, torch 2\..*transformers 5\..*; code [0-9a-f]{12}$", found["software"][1])
    assert found["GPUs"][1] == "no GPU, gloo on CPU"
    assert not list(tmp_path.iterdir())


def test_a_begun_run_is_looked_at_and_left_as_it_is(
    run: Run, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint_path(finished)
    run("stage=doctor")
    found = lines(capsys.readouterr().out)
    assert {verdict for verdict, _ in found.values()} == {"pass"}
    assert fingerprint_path(finished) == before
    assert re.search(r"[\d.]+ GB free, .* still needed \([\d.]+ MB are there\)", found["disk"][1])


@pytest.mark.slow
def test_all_that_is_wrong_is_said_at_once_and_ends_in_an_error(
    command: Command, cache: Path, teacher: Path, tmp_path: Path
) -> None:
    whole = (teacher / "model.safetensors").read_bytes()
    (teacher / "model.safetensors").write_bytes(whole[:-8])
    (tmp_path / "here").write_text("a file")
    settings = [f"cache_dir={cache}", f"run_dir={tmp_path / 'here'}", f"teacher.path={teacher}",
                "data.train=[{path: missing.jsonl}]", "cluster.gpus_per_node=8"]  # fmt: skip
    done = command(*FAST, *settings, "stage=doctor", GLOO_SOCKET_IFNAME="nope0")
    assert done.returncode == 2
    found = lines(done.stdout)
    there = [name for _, name in socket.if_nameindex()]
    expected = {
        "models": "is not a complete safetensors file",
        "text": "data.train[0].path=missing.jsonl: no such file or folder",
        "run folder": f"{tmp_path / 'here'}: cannot be made a folder or file",
        "network": f"GLOO_SOCKET_IFNAME=nope0: no network interface here fits nope0; there are {', '.join(there)}",
        "GPUs": "cluster.gpus_per_node=8, and torch finds 0 here (no NVIDIA driver is loaded); ask for them",
    }
    for check, said in expected.items():
        assert found[check][0] == "fail", check
        assert said in found[check][1]
        assert said in done.stderr, "the last line, which is all that a job's log ends in, says it too"
    assert found["software"][0] == "pass"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("value", "fits"),
    [("", True), ("{}", True), ("{}x", False), ("={}", True), ("=l", False), ("l", True), ("nope,l", True),
     ("nope", False), ("^nope", True), ("^", True), ("^{all}", False), ("^={all}", False), ("{}:0", True)],
)  # fmt: skip
def test_nccl_takes_beginnings_of_names_exclusions_and_lists(
    value: str, fits: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [name for _, name in socket.if_nameindex()]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value.format("lo", all=",".join(there)))
    if fits:
        assert CHECKS["network"](subject(cache, tmp_path)).verdict is Verdict.ok
    else:
        with pytest.raises(CompressError, match=r"NCCL_SOCKET_IFNAME=.*there are .*lo.*or leave the variable out"):
            CHECKS["network"](subject(cache, tmp_path))


@pytest.mark.parametrize(("value", "fits"), [("lo", True), ("lo,nope", False), ("l", False), ("=lo", False)])
def test_gloo_takes_whole_names(
    value: str, fits: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
    if fits:
        assert CHECKS["network"](subject(cache, tmp_path)).verdict is Verdict.ok
    else:
        with pytest.raises(CompressError, match=r"GLOO_SOCKET_IFNAME=.*launch/env.sh"):
            CHECKS["network"](subject(cache, tmp_path))


def test_a_disk_too_small_for_the_plan_is_named_with_its_largest_part(cache: Path, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    each = needs(load_config(*FAST, f"cache_dir={cache}"), 1)[1]
    [checkpoints] = [size for part, size in each.items() if part.startswith("checkpoints")]
    kept = 3 * free // checkpoints  # of which two and one more are in the figure
    found = CHECKS["disk"](subject(cache, tmp_path / "run", f"distill.keep_checkpoints={kept}"))
    assert found.verdict is Verdict.fail
    assert re.search(r"GB still needed .* most of it for checkpoints, \d+ and the one being written", found.text)
    assert CHECKS["disk"](subject(cache, tmp_path / "run")).verdict is Verdict.ok
    assert CHECKS["disk"](subject(cache, tmp_path / "run", "until=prune")).verdict is Verdict.ok


def test_what_the_run_folder_holds_is_not_needed_again(cache: Path, finished: Path) -> None:
    def still(run_dir: Path) -> float:
        text = CHECKS["disk"](subject(cache, run_dir)).text
        return float(re.search(r"([\d.]+) MB still needed", text)[1])  # type: ignore[index]

    held = sum(file.stat().st_size for file in finished.rglob("*") if file.is_file()) / 1e6
    assert still(finished.parent / "new") - still(finished) == pytest.approx(held, abs=0.11)


@pytest.fixture
def small_memory() -> Iterator[None]:
    """64 MB that this process may still take."""
    old = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + 64_000_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, old)


def _data_bytes() -> int:
    return int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


@pytest.mark.usefixtures("small_memory")
def test_memory_is_reckoned_for_all_ranks_of_the_node(cache: Path, tmp_path: Path) -> None:
    assert available_bytes() <= 64_000_000
    assert CHECKS["memory"](subject(cache, tmp_path)).verdict is Verdict.ok
    found = CHECKS["memory"](subject(cache, tmp_path, "cluster.shard_ranks=1", ranks=50))
    assert found.verdict is Verdict.fail
    assert re.match(r"50 ranks here need [\d.]+ MB each at .*; [\d.]+ MB are free, of which .* fewer ranks", found.text)
    assert CHECKS["memory"](subject(cache, tmp_path, "until=score", ranks=50)).verdict is Verdict.ok, "layer by layer"
    found = CHECKS["memory"](subject(cache, tmp_path, "until=score", "score.stream=false", ranks=500))
    assert found.verdict is Verdict.fail
    assert "500 ranks here need" in found.text
    assert "score.stream=true" in found.text


def test_memory_of_a_gpu_is_reckoned_for_its_one_rank(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free there is pretended."""
    free = 64_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    many = subject(cache, tmp_path, "cluster.shard_ranks=1", ranks=50)
    assert memory(many, torch.device("cuda")).verdict is Verdict.ok
    free = 1_000_000
    found = memory(many, torch.device("cuda"))
    assert found.verdict is Verdict.fail
    said = r"the GPUs need [\d.]+ MB each at .*; 1.0 MB are free, of which 0.9 MB can be used; more nodes, distill.rec"
    assert re.match(said, found.text)
    free = 500_000
    scoring = subject(cache, tmp_path, "until=score", "score.stream=false")
    assert "score.stream=true" in memory(scoring, torch.device("cuda")).text
    assert memory(subject(cache, tmp_path, "until=score"), torch.device("cuda")).text.endswith("a layer at a time")


def test_a_student_that_is_not_chosen_yet_can_not_be_reckoned_with_but_is_no_failure(
    cache: Path, finished: Path
) -> None:
    open_shape = ("prune.num_hidden_layers=null", "prune.intermediate_size=null", "prune.min_tokens_per_second=1",
                  "search.num_candidates=2")  # fmt: skip
    for check in ("disk", "memory"):
        found = CHECKS[check](subject(cache, finished.parent / "new", *open_shape))
        assert (found.verdict, "before its student is chosen" in found.text) == (Verdict.warn, True)
        assert CHECKS[check](subject(cache, finished, *open_shape)).verdict is Verdict.ok, "it is in prune/"


def test_a_clock_behind_what_the_run_wrote_is_said(cache: Path, finished: Path) -> None:
    file = finished / "distill" / "metrics.jsonl"
    os.utime(file, (time.time() + 7200, time.time() + 7200))
    found = CHECKS["clock"](subject(cache, finished))
    assert found.verdict is Verdict.warn
    assert f"{file} is 2.0 h in the future" in found.text


def test_a_clock_that_was_set_while_we_looked_is_said(cache: Path, tmp_path: Path) -> None:
    looked = subject(cache, tmp_path)
    earlier = (time.time() - 60, time.monotonic() - 10)  # 60 s by the one, 10 by the other
    found = CHECKS["clock"](Subject(looked.config, tmp_path, 1, 1, earlier))
    assert found.verdict is Verdict.warn
    assert "was set by +50.0 s" in found.text


def test_gpus_are_held_against_what_was_asked_for() -> None:
    assert accelerator(8, 8, 8, "570.1").verdict is Verdict.ok
    assert accelerator(4, 0, 8, "570.1").verdict is Verdict.warn
    assert accelerator(7, 8, 8, "570.1").verdict is Verdict.fail
    assert "driver 570.1" in accelerator(7, 8, 8, "570.1").text
    assert accelerator(0, 0, 2, None).verdict is Verdict.ok
    assert attention("2.8", True, True) == "flash-attn 2.8, torch's flash kernel, FlexAttention"
    assert "dense masks" in attention("not installed", False, False)


def test_nodes_that_find_the_same_share_a_line() -> None:
    same, full = Line(Verdict.ok, "fine"), Line(Verdict.fail, "full")
    said = report({"a": {"disk": same, "text": same}, "b": {"disk": full, "text": same}}, {})
    assert [re.sub(" +", " ", line) for line in said] == [
        "pass disk a: fine", "fail disk b: full", "pass text every node: fine",
        "what needs all ranks wasn't tried; mend the above first",
    ]  # fmt: skip


# -- several ranks


def start(cache: Path, folder: Path, size: int, of: dict[int, dict[str, str]], *settings: str) -> list[tuple[int, str]]:
    """(exit status, everything said) of each rank, each a node of its own as srun would start it; `of` a rank: its own
    variables, among them SETTINGS and the FOLDER that it starts in."""
    port = free_port()
    processes = []
    for rank in range(size):
        own = of.get(rank, {})
        variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                     "SLURM_LOCALID": "0", "SLURMD_NODENAME": f"n{rank}",
                     "COMPRESS_OUTCOME_FILE": str(folder / f"outcome-{rank}")} | own  # fmt: skip
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "compress", *FAST, f"cache_dir={cache}", f"run_dir={folder / 'run'}", "stage=doctor",
             *settings, *own.get("SETTINGS", "").split()],
            cwd=folder / own.get("FOLDER", ""), env=environment() | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ))  # fmt: skip
    found = []
    for process in processes:
        said, _ = process.communicate(timeout=120)
        found.append((process.returncode, said))
    return found


@pytest.mark.slow
def test_a_node_that_is_not_fit_is_named_on_every_rank(cache: Path, tmp_path: Path) -> None:
    """Its network interface is missing, so that gloo could not have told the others."""
    found = start(cache, tmp_path, 2, {1: {"GLOO_SOCKET_IFNAME": "nope0"}})
    for rank, (status, said) in enumerate(found):
        assert status == 2, said
        assert "some nodes aren't fit: n1 (rank 1): network: GLOO_SOCKET_IFNAME=nope0" in said
        assert (tmp_path / f"outcome-{rank}").read_text().startswith("unfit n1: the doctor says")
    printed = found[0][1]
    assert re.search(r"^fail  network +n1 \(rank 1\): GLOO_SOCKET_IFNAME=nope0: no network", printed, re.MULTILINE)
    assert re.search(r"^pass  network +n0 \(rank 0\): gloo takes", printed, re.MULTILINE)
    assert re.search(r"^pass  text +every node: \d+ files", printed, re.MULTILINE)
    assert "wasn't tried" in printed
    assert "pass" not in found[1][1], "the first rank speaks"


@pytest.mark.slow
def test_what_every_node_finds_is_the_settings(cache: Path, tmp_path: Path) -> None:
    found = start(cache, tmp_path, 2, {}, "data.train=[{path: missing.jsonl}]")
    for rank, (status, said) in enumerate(found):
        assert status == 2
        assert "the doctor says no: text: data.train[0].path=missing.jsonl" in said
        assert (tmp_path / f"outcome-{rank}").read_text().startswith("refused: the doctor says no")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "check", "said"),
    [
        ({"SETTINGS": "distill.beta2=0.98"}, "settings", "rank 1 of 2 has another distill.beta2 than rank 0"),
        ({"FOLDER": "elsewhere"}, "shared folder", "run_dir=run is not the same folder for rank 1 of 2"),
    ],
)
def test_ranks_that_differ_are_told_so(
    other: dict[str, str], check: str, said: str, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    found = start(cache, tmp_path, 2, {1: other}, "run_dir=run")
    assert [status for status, _ in found] == [2, 2]
    assert all(said in text for _, text in found)
    verdicts = {name: verdict for name, (verdict, _) in lines(found[0][1]).items()}
    assert [name for name, verdict in verdicts.items() if verdict != "pass"] == [check], "and the rest is looked at"
    assert not (tmp_path / "run").exists(), "nothing is kept"
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_fit_ranks_of_torchrun_pass(cache: Path, tmp_path: Path) -> None:
    done = torchrun(2, tmp_path, *FAST, f"cache_dir={cache}", f"run_dir={tmp_path / 'run'}", "stage=doctor")
    assert done.returncode == 0, done.stderr
    found = lines(done.stdout)
    assert {verdict for verdict, _ in found.values()} == {"pass"}
    assert [*found] == [*CHECKS, *agreement.CHECKS, "clocks"]
    assert re.search(r"2 ranks here need", found["memory"][1])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_faketime
@pytest.mark.parametrize(("seconds", "verdict"), [(-3, "warn"), (90, "fail")])
def test_a_node_whose_clock_is_off_is_named(seconds: int, verdict: str, cache: Path, tmp_path: Path) -> None:
    off = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"{seconds:+}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    found = start(cache, tmp_path, 2, {1: off})
    assert [status for status, _ in found] == ([2, 2] if verdict == "fail" else [0, 0])
    said = lines(found[0][1])["clocks"]
    assert said[0] == verdict
    measured = float(re.search(r"rank 1's is ([+-][\d.]+) s off the first one's", said[1])[1])  # type: ignore[index]
    assert measured == pytest.approx(seconds, abs=0.5)


@pytest.mark.parametrize("stage", ["doctor", pytest.param("distill", marks=pytest.mark.slow)])
def test_a_port_in_use_is_said_without_torchs_trace(stage: str, cache: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        [(status, said)] = start(
            cache, tmp_path, 1, {0: {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}}, f"stage={stage}"
        )
    assert status == 2
    assert f"MASTER_PORT={port} is in use on this node, the first rank's; give another one" in said
    assert "Traceback" not in said
    assert (tmp_path / "outcome-0").read_text().startswith("unfit : MASTER_PORT"), "another try has another port"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"GLOO_SOCKET_IFNAME": "nope0"}, "GLOO_SOCKET_IFNAME=nope0: no network interface here fits nope0; there are"),
        ({"MASTER_PORT": ""}, "rank 0 of 2 found no way to the first one, MASTER_ADDR=127.0.0.1 MASTER_PORT="),
        ({"MASTER_PORT": "nine"}, "rank 0 of 2 found no way to the first one, MASTER_ADDR=127.0.0.1 MASTER_PORT=nine"),
    ],
)
def test_ranks_that_can_not_meet_say_why(variables: dict[str, str], said: str, cache: Path, tmp_path: Path) -> None:
    [(status, found)] = start(cache, tmp_path, 1, {0: {"WORLD_SIZE": "2"} | variables}, "stage=distill")
    assert status == 2
    assert said in found
    assert "Traceback" not in found


def test_until_says_what_is_asked_about(cache: Path, tmp_path: Path) -> None:
    assert "distill" not in subject(cache, tmp_path, "until=score").stages
    with pytest.raises(ConfigError, match="until=doctor is no stage to stop after"):
        load_config(*FAST, "until=doctor")
    assert (REPOSITORY / "launch" / "stage.sbatch").read_text().count("stage=doctor") == 1
