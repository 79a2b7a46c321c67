"""照着计划跑，边跑边看表：机器忙闲变了，就改还要走的步数，时间照旧。

机器不会一直像测速那几秒一样闲或一样忙。每一段走到几个时刻看一眼日志：照现在的快慢要早到或晚到太多，就让训练存盘停下
（它逐位续得上），换一个总步数接着走，学习率照新的总步数降完。差得不多就不动：重新起步也要时间。
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from minimind.console import format_duration, say
from minimind.errors import UserError
from minimind.plan.planning import FEWEST_STEPS, Batch, Costs, Leg, set_steps
from minimind.report.logs import read_log
from minimind.signals import taken_by

CHECKS = (0.15, 0.4, 0.7)  # 走到这一段时间的这些份额时看一眼
TOLERATED = 0.06  # 早晚不到这一段的这么多就不动
WORTH = 1.5  # 也要多过重新起步的这么多倍
RECENT = 0.15  # 快慢看最近这么多份额的时间，至少 RECENT_SECONDS
RECENT_SECONDS, POLL_SECONDS = 20.0, 0.5
LEAVING_SECONDS = 120.0  # 收到退出信号后，等训练存完盘
WEIGHTS = {"pretrain": "pretrain", "sft": "full_sft"}  # 命令 → 它写的权重的名字


class StageStopped(SystemExit):
    """一段因退出信号而停。

    Args:
        code: 它的退出码。
        command: 接着走这一段的命令；这一段恰好走完了是空的。
    """

    def __init__(self, code: int, command: str = ""):
        super().__init__(code)
        self.command = command


def corrected(
    stage: Leg, seen: list[tuple[float, int]], left: float, seconds: float, costs: Costs, batch: Batch
) -> Leg | None:
    """照看到的快慢，该换成多少步；不必换为 None。

    Args:
        seen: ``(时刻, 步)``，由早到晚。
        left: 离这一段该结束还有几秒。
        seconds: 这一段一共几秒。
    """
    window = recent_seconds(seconds)
    recent = [point for point in seen if point[0] >= seen[-1][0] - window] if seen else []
    if len(recent) < 2 or recent[-1][1] == recent[0][1]:
        return None
    (begin, first), (now, step) = recent[0], recent[-1]
    pace = (now - begin) / (step - first)
    slower = pace / costs.step  # 验证与起步跟着一起快慢
    tail = slower * (costs.validation(stage.validation_rows, batch) + costs.samples) + costs.save
    late = (stage.steps - step) * pace + tail - left
    restart = slower * costs.start
    if abs(late) <= max(TOLERATED * seconds, WORTH * restart):
        return None
    steps = step + max(int((left - tail - restart) / pace), math.ceil(FEWEST_STEPS / 4))
    return None if abs(steps - stage.steps) < 0.02 * stage.steps else set_steps(stage, steps, batch)


def recent_seconds(seconds: float) -> float:
    """快慢看最近多少秒。"""
    return max(RECENT * seconds, RECENT_SECONDS)


class Leaving:
    """跑着的时候退出信号由它接手（:class:`minimind.signals.Taker`）：记下来，转给训练；训练自己限时存盘，这里等它。"""

    def __init__(self) -> None:
        self.signum = 0

    def signalled(self, signum: int) -> None:
        self.signum = self.signum or signum

    def overdue(self, signum: int) -> None:
        """不催：训练放弃手上那一步、存完盘就走；再来一次信号才带着它立刻离开。"""


def leave(process: subprocess.Popen, signum: int) -> None:
    """把退出信号转给训练，等它存完盘；太久就结束它。它在自己的会话里，终端的 Ctrl-C 到不了，所以恰好一次。"""
    if process.poll() is None and not (os.name == "nt" and signum == signal.SIGINT):  # 那里终端已经给过它了
        process.send_signal(signum)
    try:
        process.wait(LEAVING_SECONDS)
    except subprocess.TimeoutExpired:
        say(f"{LEAVING_SECONDS:.0f} 秒还没有存完盘，结束了它。")
        process.kill()
        process.wait()


def how_to_continue(stage: Leg, folder: Path, since: float) -> str:
    """中途停下之后怎么接着走这一段：这一次存过盘就续训，还没有就从头。"""
    archives = (folder / "checkpoints").glob(f"{WEIGHTS[stage.words[0]]}_[0-9]*_resume.pth")
    saved = any(path.stat().st_mtime >= since for path in archives)
    return stage.command + (" --from_resume 1" if saved else "")


def follow(stage: Leg, seconds: float, folder: Path, costs: Costs, batch: Batch) -> Leg:
    """跑一段，看得见它的进度；返回实际走的。退出信号转给它，等它存完盘。

    Raises:
        UserError: 没有跑成。
        StageStopped: 它因退出信号而停。
    """
    leaving = Leaving()
    with taken_by(leaving):
        return follow_leaving(stage, seconds, folder, costs, batch, leaving)


def follow_leaving(
    stage: Leg, seconds: float, folder: Path, costs: Costs, batch: Batch, leaving: Leaving
) -> Leg:
    """:func:`follow` 的正文，``leaving`` 里有信号就停。"""
    begin, since = time.monotonic(), time.time()
    # Windows 上没有“存盘再走”的信号，只能照原来的步数走
    checks = [share * seconds for share in CHECKS] if os.name != "nt" else []
    seen: list[tuple[float, int]] = []
    process, started = start(stage), time.time()
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if leaving.signum:
                leave(process, leaving.signum)
                break
            now = time.monotonic()
            # 日志越来越长，只在快要看表的时候读
            if not checks or now - begin < checks[0] - recent_seconds(seconds):
                continue
            step = last_step(folder, stage, started)
            if step is not None and (not seen or step > seen[-1][1]):
                seen.append((now, step))
            if now - begin < checks[0]:
                continue
            checks.pop(0)
            left = begin + seconds - now
            better = corrected(stage, seen, left, seconds, costs, batch)
            if better is None:
                continue
            say(
                f"机器的快慢变了：还剩 {format_duration(max(left, 0))}，总步数 {stage.steps:,} → {better.steps:,}，存盘后接着走。"
            )
            process.send_signal(signal.SIGTERM)
            if process.wait(LEAVING_SECONDS) != 128 + signal.SIGTERM:  # 恰好走完了，或出了别的事
                break
            stage, seen = better, []
            resumed = replace(stage, words=[*stage.words, "--from_resume", "1"])
            process, started = start(resumed), time.time()
    except BaseException:
        leave(process, signal.SIGTERM)
        raise
    code = process.returncode
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM, 129):
        raise StageStopped(code, how_to_continue(stage, folder, since))
    if leaving.signum and not code:  # 恰好走完了
        raise StageStopped(128 + leaving.signum)
    if code:
        raise UserError(
            f"{stage.title}没有跑成（退出码 {code}，原因见上面）",
            where=stage.command,
            fix="解决之后照抄这一条接着跑",
        )
    return stage


def start(stage: Leg) -> subprocess.Popen:
    # 自己的会话：Ctrl-C 只到这里，由这里转给它一次（Windows 上照旧）
    words = [sys.executable, "-m", "minimind", *stage.words]
    return subprocess.Popen(words, env=os.environ, start_new_session=True)


def log_of(folder: Path, stage: Leg) -> Path | None:
    """这一段的日志；还没有为 None。"""
    weight = WEIGHTS[stage.words[0]]
    found = sorted((folder / "logs").glob(f"{weight}_[0-9]*.jsonl"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def last_step(folder: Path, stage: Leg, since: float) -> int | None:
    """日志里最后一步；``since`` 之后没有写过的是旧的，不算。"""
    log = log_of(folder, stage)
    if log is None or log.stat().st_mtime < since:
        return None
    steps = [record["step"] for record in read_log(log) if "loss" in record]
    return steps[-1] if steps else None
