"""`linearize launch`: what each preset would start, what it starts, and what it refuses."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from linearize.cli import launching, main

COMMAND = f"{shlex.quote(sys.executable)} -m linearize.cli.torchrun --nproc-per-node 2"
WHERE = ["stages.transfer.lr=5e-3", "layers=[0, 2]", "--out", "runs/some where"]
RUN = "-m linearize run me/model lolcats stages.transfer.lr=5e-3 'layers=[0, 2]' --out 'runs/some where'"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["launch", *arguments])
    return code, *capsys.readouterr()


def test_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["node", "me/model", "lolcats", *WHERE, "--set", "processes=2", "--dry-run"]
    assert said(capsys, *given) == (0, f"{COMMAND} --standalone {RUN}\n", "")
    code, out, _ = said(capsys, *given, "--resume", "--budget", "10m")
    assert code == 0 and out.rstrip().endswith("--budget 10m --out 'runs/some where' --resume")


def test_several_machines(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["nodes", "me/model", "lolcats", *WHERE, "--set", "processes=2", "--dry-run"]
    code, _, err = said(capsys, *given)
    assert code == 2 and "preset 'nodes' needs endpoint: add --set endpoint=" in err
    found = said(capsys, *given, "--set", "endpoint=node1:29500", "--set", "nodes=3")
    meet = "--nnodes 3 --rdzv-backend c10d --rdzv-endpoint node1:29500 --rdzv-id linearize"
    assert found == (0, f"{COMMAND} {meet} {RUN}\n", "")


@pytest.mark.parametrize(
    "given, words",
    [
        (["noed", "m", "lolcats"], "unknown preset 'noed': did you mean 'node'"),
        (["node", "m", "lolcat"], "unknown recipe 'lolcat'"),
        (["node", "m", "lolcats", "--set", "process=2"], "'node' has no process; did you mean 'processes'"),
        (
            ["node", "m", "lolcats", "--set", "processes"],
            "--set processes: must be KEY=VALUE, such as processes=1",
        ),
        (
            ["node", "m", "lolcats", "--set", "processes=0"],
            "--set processes=0: must be a whole number from 1",
        ),
        (["node", "m", "lolcats", "--set", "nodes=two"], "--set nodes=two: must be a whole number from 1"),
    ],
)
def test_refusals(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, *given)
    assert code == 2 and words in err, err


@pytest.mark.parametrize("others", [True, False])
def test_a_queue_without_its_launcher(
    others: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where hydra has other plugins, and where it has none: then the package of plugins is not there either."""
    for name in [name for name in sys.modules if name.startswith("hydra_plugins")]:
        monkeypatch.delitem(sys.modules, name)
    folders = [path for path in sys.path if not (Path(path) / "hydra_plugins").exists()]
    monkeypatch.setattr("sys.path", folders + [str(tmp_path)] * others)
    (tmp_path / "hydra_plugins" / "hydra_another").mkdir(parents=True)
    code, _, err = said(capsys, "slurm", "m", "lolcats")
    assert code == 2 and "pip install hydra-submitit-launcher" in err


def test_a_job_s_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hydra hands over comes out as it was given, and a run that failed fails the job."""
    started: list[Any] = []
    codes = [0, 2]
    monkeypatch.setitem(
        sys.modules, "submitit", SimpleNamespace(JobEnvironment=lambda: SimpleNamespace(hostnames=["a", "b"]))
    )
    monkeypatch.setattr(launching, "_run", lambda command, config: started.append(command) or codes.pop(0))

    class Config(dict):
        __getattr__ = dict.__getitem__

    run = ["me/model", "lolcats", "layers=[0, 2]", "--resume"]
    config = Config(nodes=2, processes=8, port=29500, line="x" + json.dumps(run).encode().hex())
    launching.task(config)
    assert started[0][-4:] == run and "a:29500" in started[0]
    with pytest.raises(RuntimeError, match="ended with code 2"):
        launching.task(config)


@pytest.mark.parametrize(
    "program, code, said",
    [
        ("import sys; sys.exit(2 * (1 - int(__import__('os').environ['RANK'])))", 2, ""),
        pytest.param("raise ValueError('odd')", 1, "ValueError: odd", marks=pytest.mark.slow),
        # one write each: two processes share the stream
        (r"import os, time; os.write(1, b'begun\n'); time.sleep(60)", 143, ""),
    ],
)
def test_it_ends_as_its_processes_do(program: str, code: int, said: str, tmp_path: Path) -> None:
    """The code of the process that failed first, or of the signal, and no word of torchrun's own where one was said."""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "linearize.cli.torchrun", "--nproc-per-node", "2", "--standalone"]
    with subprocess.Popen(
        [*command, str(tmp_path / "program.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if code == 143:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGTERM)
        _, words = process.communicate(timeout=300)
    assert process.returncode == code, words
    assert said in words
    assert "SignalException" not in words and "raise ChildFailedError" not in words


def test_what_it_starts_and_how_it_ends(tmp_path: Path) -> None:
    program = "import os, sys; open(sys.argv[1], 'w').write(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT']); sys.exit(3)"
    code = launching._run([sys.executable, "-c", program, str(tmp_path / "said")], {"seconds_to_stop": 7})
    assert code == 3 and (tmp_path / "said").read_text() == "7"
