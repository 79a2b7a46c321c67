"""``--watch 1``：页面在另一个进程里，训练不论怎么结束它都走；开不成时训练照常。"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import httpx
import pytest
from watch_logs import append, rows
from watch_server import serving, until

from minimind import cli
from minimind.errors import UserError
from minimind.watch import beside
from minimind.watch.beside import already_open, page_beside, start_page, stop_page
from minimind.watch.cli import make_server


def test_页面跟着训练开_跟着训练关(folder, capfd):
    append(folder / "logs" / "a.jsonl", *rows(1, 3))
    said = []

    def address() -> str | None:
        said.append(capfd.readouterr().err)
        found = re.search(r"(http://127\.0\.0\.1:\d+)", "".join(said))
        return found and found[1]

    with page_beside(folder):
        until(address, "没有报地址")
        url = address()
        assert len(httpx.get(f"{url}/api/runs").json()["runs"]) == 1
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")


def test_训练被杀_页面也走(folder, root_dir):
    code = (
        "import sys, time\nfrom minimind.watch.beside import start_page\nfrom pathlib import Path\n"
        f"print(start_page(Path({str(folder)!r})).pid, flush=True)\ntime.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root_dir)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()

    def gone() -> bool:
        try:
            with open(f"/proc/{child}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    if not os.path.isdir("/proc/self"):
        pytest.skip("没有 /proc")
    until(gone, "训练没了，页面的进程还在")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_不要_或不是主进程_就不起进程(folder, monkeypatch, rank):
    started = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(beside, "start_page", lambda folder: started.append(folder))
    with page_beside(folder, wanted=False):
        pass
    with page_beside(folder):
        pass
    assert started == ([folder] if rank == "0" else [])


def test_没有装服务的库_训练照常_minimind_watch说怎么装(folder, monkeypatch, capsys):
    monkeypatch.setattr(beside, "find_spec", lambda name: None)
    assert start_page(folder) is None
    assert "训练照常" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"没有装服务要用的库.*pip install -e '\.\[serve\]'"):
        make_server(folder, "127.0.0.1", 0)


def test_进程起不来_训练照常(folder, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError(12, "内存不够")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert start_page(folder) is None
    assert "内存不够" in capsys.readouterr().err


def test_页面的进程自己死了_训练收尾不出错(folder):
    process = start_page(folder)
    process.kill()
    stop_page(process)
    assert process.returncode is not None


def test_同一个目录已经开着页面_认得出来(folder, tmp_path):
    with serving(folder) as url:
        port = int(url.rpartition(":")[2])
        assert already_open(folder, port) and not already_open(tmp_path / "other", port)
    assert not already_open(folder, port)


def test_watch_是文件就说清(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert cli.main(["watch", "--save_dir", str(tmp_path / "out")]) == 2
    assert "是文件，不是目录" in capsys.readouterr().err


def test_watch_指着放日志的目录_看它的上一级(folder, monkeypatch, capsys):
    """照收就是一页空白：日志在 {save_dir}/logs 里，不在 {save_dir}/logs/logs 里。"""
    from types import SimpleNamespace

    from minimind.watch import cli

    append(folder / "logs" / "a.jsonl", *rows(1, 3))
    seen = []
    monkeypatch.setattr(
        cli, "make_server", lambda where, *_: seen.append(where) or SimpleNamespace(run=lambda: None)
    )
    assert cli.main(["--save_dir", str(folder / "logs"), "--port", "0"]) == 0
    assert seen == [folder] and "看它的上一级" in capsys.readouterr().err
