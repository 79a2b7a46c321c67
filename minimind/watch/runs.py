"""有哪些训练：找出日志，各说一句现状；要看的才整个读进内存，太多了就放下最久没看的。"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from minimind.paths import printable
from minimind.trainer.exhibits import number
from minimind.watch.history import AXES, History, parse_line
from minimind.watch.tail import open_regular

DEPTH = 2  # 在 save_dir 之下找几层：演示与各次试验常各在一个子目录里
SUMMARY_BYTES = 64 << 10  # 一句现状只看末尾这么多
# 末尾有很长的一行（几十个提示的样例），里面的行数不够，就往前多看，至多到这么多
MOST_SUMMARY_BYTES, FEWEST_RECORDS = 8 << 20, 20
CHUNK = 8 << 20  # 一次请求至多读这么多字节的日志（约半秒）；没读完的下次接着读
MAX_POINTS = 20_000_000  # 内存里至多这么多点，约 320 MB
CARD_SUFFIX = ".card.json"
# 日志这么久没有长就不算在训练；两行之间本来就要很久的，放宽到间隔的五倍
QUIET_SECONDS, QUIET_INTERVALS = 120.0, 5


@dataclass(frozen=True)
class LogFile:
    """一个日志文件。

    Attributes:
        id: 路径的指纹，网址里用它；名字里有什么字符都不要紧，也不会被当成路径。
        name: 文件名去掉后缀。
        folder: 相对 save_dir 的目录，就在它之下的是空串。
    """

    id: str
    name: str
    folder: str
    path: Path
    save_dir: Path


def find_sources(folder: Path) -> dict[str, LogFile]:
    """``folder`` 与它下面几层里的 ``logs/*.jsonl``；读不了的目录跳过。"""
    found, waiting = {}, [(folder, 0)]
    while waiting:
        here, depth = waiting.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            try:
                is_folder = entry.is_dir(follow_symlinks=depth == 0)  # 深处的链接不跟，免得绕圈
            except OSError:
                continue
            if not is_folder or entry.name.startswith("."):
                continue
            if entry.name == "logs":
                for path in sorted(Path(entry.path).glob("*.jsonl")):
                    source = make_source(path, here, folder)
                    found[source.id] = source
            elif depth < DEPTH:
                waiting.append((Path(entry.path), depth + 1))
    return found


def make_source(path: Path, save_dir: Path, root: Path) -> LogFile:
    """见 :class:`LogFile`。"""
    mark = hashlib.blake2s(os.fsencode(path.relative_to(root)), digest_size=6).hexdigest()
    inside = save_dir.relative_to(root).as_posix()
    return LogFile(mark, printable(path.stem), "" if inside == "." else printable(inside), path, save_dir)


def read_json(path: Path) -> dict[str, Any]:
    """一个 JSON 对象；没有、读不了、不是对象都给空的。"""
    try:
        with open_regular(path) as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def last_records(path: Path) -> list[dict[str, Any]]:
    """文件末尾的若干行，前后不完整的不算。"""
    taken = SUMMARY_BYTES
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        while True:
            file.seek(max(0, size - taken))
            lines = file.read(min(taken, size)).split(b"\n")
            lines = lines[1:-1] if size > taken else lines[:-1]
            if len(lines) >= FEWEST_RECORDS or taken >= min(size, MOST_SUMMARY_BYTES):
                return [record for line in lines if (record := parse_line(line)) is not None]
            taken *= 4


def summarize(source: LogFile) -> dict[str, Any]:
    """一句现状：到第几步、损失与验证、速度、还要多久、体征的话。

    Raises:
        OSError: 日志读不了。
    """
    records, card = last_records(source.path), read_json(source.path.with_suffix(CARD_SUFFIX))
    latest: dict[str, Any] = {}
    for record in records:
        latest.update(
            (key, value) for key, value in ((key, number(record[key])) for key in record) if value is not None
        )
    total = number(card.get("total_steps"))
    total = total if total is not None and total > 0 else None
    pace = seconds_per_step(records)
    step = latest.get("step", 0.0)
    notes = [
        text
        for record in records
        if isinstance(record.get("notes"), list)
        for text in record["notes"]
        if isinstance(text, str)
    ]
    keys = ("loss", "val_loss", "val_bpb", "reward", "val_reward", "tokens", "tokens_per_s", "time", "mfu")
    return {
        "recipe": card.get("recipe") if isinstance(card.get("recipe"), str) else None,
        "step": step,
        "total": total,
        "left": number(pace * max(total - step, 0)) if pace is not None and total else None,
        "gap": interval_seconds(records),
        "notes": notes[-3:],
        **{key: latest.get(key) for key in keys},
    }


def seconds_per_step(records: list[dict[str, Any]]) -> float | None:
    """一步几秒：看最后的一百行。"""
    timed = [record for record in records[-100:] if number(record.get("time")) is not None]
    if len(timed) < 2:
        return None
    steps, seconds = (float(timed[-1][key]) - float(timed[0][key]) for key in ("step", "time"))
    return number(seconds / steps) if steps > 0 and seconds >= 0 else None


def interval_seconds(records: list[dict[str, Any]]) -> float:
    """相邻两行之间最久隔了几秒训练。"""
    times = [value for record in records[-20:] if (value := number(record.get("time"))) is not None]
    return number(max((later - earlier for earlier, later in pairwise(times)), default=0.0)) or 0.0


class Runs:
    """``folder`` 下的全部训练；各方法可以在几个线程里同时调用。"""

    def __init__(self, folder: Path, max_points: int = MAX_POINTS, chunk: int = CHUNK):
        self.folder, self.max_points, self.chunk = folder, max_points, chunk
        self._lock = threading.Lock()
        self._sources: dict[str, LogFile] = {}
        # id → (文件与卡片的标记, 现状, 何时看到它变成这样)
        self._summaries: dict[str, tuple[Any, dict[str, Any], float]] = {}
        self._histories: OrderedDict[str, History] = OrderedDict()

    def list(self, now: float | None = None) -> list[dict[str, Any]]:
        """各次训练的现状，新动过的在前；没变的不重读。"""
        now = time.time() if now is None else now
        with self._lock:
            self._sources = find_sources(self.folder)
            for gone in set(self._summaries) - set(self._sources):
                del self._summaries[gone]
                self._histories.pop(gone, None)
            rows = [row for source in self._sources.values() if (row := self._row(source, now)) is not None]
        return sorted(rows, key=lambda row: -row["updated"])

    def _row(self, source: LogFile, now: float) -> dict[str, Any] | None:
        try:
            status = source.path.stat()
            mark = (status.st_ino, status.st_size, status.st_mtime_ns, file_mark(source, CARD_SUFFIX))
            known = self._summaries.get(source.id)
            if known is None or known[0] != mark:
                known = self._summaries[source.id] = (mark, summarize(source), now)
        except OSError:
            return None
        summary = known[1]
        # 共享盘的时钟可以比这里快：修改时间在将来的，从看到它变的那一刻算起，免得一直算在训练
        updated = min(status.st_mtime, known[2])
        quiet = max(QUIET_SECONDS, QUIET_INTERVALS * summary["gap"])
        if summary["total"] and summary["step"] >= summary["total"]:
            state = "done"
        else:
            state = "running" if now - updated < quiet else "stopped"
        row = {key: value for key, value in summary.items() if key != "gap"}
        return {
            "id": source.id,
            "name": source.name,
            "folder": source.folder,
            "state": state,
            "updated": updated,
            **row,
        }

    def detail(
        self,
        run_id: str,
        axis: str = "step",
        points: int = 500,
        low: float | None = None,
        high: float | None = None,
        have: str | None = None,
    ) -> dict[str, Any] | None:
        """一次训练的曲线、体征、可以回看的步；没有这次训练给 None。

        Args:
            axis: 横轴，:data:`minimind.watch.history.AXES` 之一。
            points: 一条曲线至多几个点。
            low, high: 横轴只要这之间的。
            have: 对方已有的 ``version``；没变就只答 ``{"same": True}``。
        """
        if axis not in AXES:
            raise ValueError(f"横轴 {axis!r} 不是 {'、'.join(AXES)} 之一")
        with self._lock:
            source = self._source(run_id)
            if source is None:
                return None
            history = self._history(source)
            history.refresh(self.chunk)
            exam = source.save_dir / "eval" / f"{source.path.stem}_world.json"
            version = f"{history.version}-{stamp(exam)}"
            if have == version and history.complete:
                return {"same": True}
            self._make_room(run_id)
            return {
                "version": version,
                "complete": history.complete,
                "keys": {key: history.curve(key, axis, points, low, high) for key in history.columns},
                "notes": list(history.notes),
                "records": {
                    kind: sorted({step for step, _, _ in marks}) for kind, marks in history.marks.items()
                },
                "exam": exam_scores(exam),
            }

    def record(self, run_id: str, kind: str, step: float) -> dict[str, Any] | None:
        """见 :meth:`minimind.watch.history.History.record`；没有给 None。"""
        with self._lock:
            source = self._source(run_id)
            if source is None:
                return None
            history = self._history(source)
            if not history.tail.offset:  # 页面开着时服务重启过：先读一遍
                history.refresh(self.chunk)
            found = history.record(kind, step)
        return None if found is None else {"step": found[0], "value": found[1]}

    def _source(self, run_id: str) -> LogFile | None:
        if run_id not in self._sources:
            self._sources = find_sources(self.folder)
        return self._sources.get(run_id)

    def _history(self, source: LogFile) -> History:
        history = self._histories.setdefault(source.id, History(source.path))
        self._histories.move_to_end(source.id)
        return history

    def _make_room(self, keep: str) -> None:
        total = sum(history.points for history in self._histories.values())
        for run_id in list(self._histories):
            if total <= self.max_points:
                return
            if run_id != keep:
                total -= self._histories.pop(run_id).points


def stamp(path: Path) -> int:
    """文件的修改时间；没有为 0。"""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def file_mark(source: LogFile, suffix: str) -> int:
    """日志旁边、同名另一后缀的文件的修改时间。"""
    return stamp(source.path.with_suffix(suffix))


def exam_scores(path: Path) -> dict[str, float]:
    """``minimind eval world`` 写下的各任务的正确率 ``{任务: 0 到 1}``；没有考过是空的。"""
    tasks = read_json(path).get("tasks")
    scores = {}
    for task, entry in tasks.items() if isinstance(tasks, dict) else ():
        entry = entry if isinstance(entry, dict) else {}
        correct, total = (number(entry.get(key)) for key in ("correct", "total"))
        if correct is not None and total and (score := number(correct / total)) is not None:
            scores[task] = score
    return scores
