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

CHECKS = (0.15, 0.4, 0.7)  # 走到这一段时间的这些份额时看一眼
TOLERATED = 0.06  # 早晚不到这一段的这么多就不动
WORTH = 1.5  # 也要多过重新起步的这么多倍
RECENT = 0.15  # 快慢看最近这么多份额的时间，至少 RECENT_SECONDS
RECENT_SECONDS, POLL_SECONDS = 20.0, 0.5
LEAVING_SECONDS = 120.0  # 收到退出信号后，等训练存完盘


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


def follow(stage: Leg, seconds: float, folder: Path, costs: Costs, batch: Batch) -> Leg:
    """跑一段，看得见它的进度；返回实际走的。退出信号转给它，等它存完盘。

    Raises:
        UserError: 没有跑成。
        SystemExit: 它因退出信号而停。
    """
    begin = time.monotonic()
    # Windows 上没有“存盘再走”的信号，只能照原来的步数走
    checks = [share * seconds for share in CHECKS] if os.name != "nt" else []
    seen: list[tuple[float, int]] = []
    process, started = start(stage), time.time()
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
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
    except BaseException as error:
        # Ctrl-C 终端已经发给它了，再发一次它就不存盘了；SIGTERM 只发给了我们，转给它
        if process.poll() is None and not isinstance(error, KeyboardInterrupt):
            process.send_signal(signal.SIGTERM)
        process.wait(LEAVING_SECONDS)
        raise
    code = process.returncode
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM, 129):
        raise SystemExit(code)
    if code:
        raise UserError(
            f"{stage.title}没有跑成（退出码 {code}，原因见上面）",
            where=stage.command,
            fix="解决之后照抄这一条接着跑",
        )
    return stage


def start(stage: Leg) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "minimind", *stage.words], env=os.environ)


def log_of(folder: Path, stage: Leg) -> Path | None:
    """这一段的日志；还没有为 None。"""
    weight = {"pretrain": "pretrain", "sft": "full_sft"}[stage.words[0]]
    found = sorted((folder / "logs").glob(f"{weight}_[0-9]*.jsonl"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def last_step(folder: Path, stage: Leg, since: float) -> int | None:
    """日志里最后一步；``since`` 之后没有写过的是旧的，不算。"""
    log = log_of(folder, stage)
    if log is None or log.stat().st_mtime < since:
        return None
    steps = [record["step"] for record in read_log(log) if "loss" in record]
    return steps[-1] if steps else None
