"""退出信号：任何命令、任何时刻都走得掉，退出码是 128 + 信号号，没有调用栈，不留下子进程。"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind import signals
from minimind.errors import UserError, guard

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows 没有这些信号")
CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
READY = "import pathlib, sys; pathlib.Path('ready').touch(); "
# 主线程一头扎进 C 里，信号处理函数轮不到执行；不拿 GIL，像编译与大矩阵乘那样
STUCK = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
CHILD = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); "


def start(folder: Path, code: str, **options) -> subprocess.Popen:
    """以 ``code`` 为命令的模块，由 launch 起跑；等它写出 ready。"""
    (folder / "job.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "-c", "from minimind.launch import launch; launch('job:main')"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{Path(signals.__file__).parents[1]}{os.pathsep}{folder}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    while not (folder / "ready").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def end(process: subprocess.Popen, *signums: int) -> tuple[int, str, str]:
    for signum in signums:
        process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_导入途中收到信号(tmp_path, signum, code):
    """库把中断换成别的异常（导入 numpy 一半时就是 ImportError）也不要紧。"""
    job = (
        READY + "\ntry:\n    import time; time.sleep(600)\nexcept BaseException: raise ImportError('半截')\n"
    )
    returned, _, err = end(start(tmp_path, job), signum)
    assert returned == code and err == "已中断。\n"


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_命令里收到信号_收拾完再走(tmp_path, signum, code):
    job = (
        f"from minimind.errors import guard\n@guard\ndef main():\n    try:\n        {READY}\n"
        "        import time; time.sleep(600)\n    finally:\n        print('收拾好了')\n"
    )
    returned, out, err = end(start(tmp_path, job), signum)
    assert (returned, out, err) == (code, "收拾好了\n", "已中断。\n")


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_主线程回不来也走得掉_带走子进程(tmp_path, signum, code):
    job = f"from minimind.errors import guard\n@guard\ndef main():\n    {CHILD}{READY}{STUCK}"
    returned, out, _ = end(start(tmp_path, job), signum)
    assert returned == code
    assert_gone(int(out))


def test_第二次立即离开_带走子进程(tmp_path):
    job = (
        "from minimind.errors import guard\n@guard\ndef main():\n"
        f"    try:\n        {CHILD}{READY}\n        import time; time.sleep(600)\n"
        "    finally:\n        pathlib.Path('cleaning').touch(); time.sleep(600)\n"
    )
    process = start(tmp_path, job)
    process.send_signal(signal.SIGTERM)
    while not (tmp_path / "cleaning").exists():
        time.sleep(0.01)
    time.sleep(1)  # 隔几毫秒的算同一次（timeout 会那样发两次）
    returned, out, _ = end(process, signal.SIGINT)
    assert returned == 130
    assert_gone(int(out))


def assert_gone(pid: int) -> None:
    """进程没了；容器里没人收尸的僵尸也算。"""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(600):  # 忙的机器上，SIGKILL 之后要轮到它跑一下才真的没了
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"进程 {pid} 还在")


def test_nohup启动的照旧不理SIGHUP(tmp_path):
    job = f"import time\ndef main():\n    {READY}\n    while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = start(tmp_path, job, **ignore)
    process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert end(process)[0] == 0


def test_信号之后的错误是它的余波():
    """一起收到信号的子进程先走了，主进程报“子进程意外退出”：那不是使用者的错。"""

    @guard
    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        except BaseException:
            raise UserError("分词子进程意外退出") from None

    before = [signal.getsignal(s) for s in signals.SIGNALS]
    assert main() == 143
    assert [signal.getsignal(s) for s in signals.SIGNALS] == before  # 出来之后恢复原样


def test_fork出来的子进程收到信号_不算父进程收到():
    with signals.watching() as watch:
        pid = os.fork()
        if not pid:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert watch.signum == 0 and watch.arrived == 0


def test_别人装了处理函数就归别人管():
    """服务用的 uvicorn 自己处理信号，几次都行。"""
    seen = []
    with signals.watching() as watch:
        before = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.01)
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] * 3 and watch.signum == 0


def test_子孙进程都找得到():
    process = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    grandchild = int(process.stdout.readline())
    assert {process.pid, grandchild} <= set(signals.descendants(os.getpid()))
    signals.kill_descendants()
    process.wait()
    process.stdout.close()
    assert_gone(grandchild)


@pytest.mark.parametrize(
    "command", [["-m", "minimind", "pretrain"], ["trainer/train_pretrain.py"], ["eval_llm.py"]]
)
def test_入口先装信号再导入(root_dir, command):
    """真的入口：torch 换成一个导入不完的替身，其间的 Ctrl-C 不出调用栈。"""
    code = (
        "import runpy, sys, signal, time, importlib.abc\n"
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('torch', 'rich.console'):\n"
        "            signal.raise_signal(signal.SIGINT); time.sleep(600)\n"
        "sys.meta_path.insert(0, Slow())\n"
        f"command = {command!r}; sys.argv = command[-1:]\n"
        "if command[0] == '-m':\n"
        "    sys.argv = command[1:]\n"
        "    runpy.run_module('minimind', run_name='__main__', alter_sys=True)\n"
        "else:\n"
        "    runpy.run_path(command[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root_dir,
        env={**os.environ, "PYTHONPATH": str(root_dir)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 130 and done.stderr == "已中断。\n"
