"""日志：每隔几步的一行（打印，写成 JSON，交给记录工具），开始前与结束时的话，剩余时间。"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.console import format_duration, say
from minimind.errors import UserError
from minimind.model import MiniMindConfig, count_parameters, flops_per_token
from minimind.paths import resolve_path
from minimind.runtime.checkpoint import atomic_write
from minimind.runtime.device import device_name, peak_memory_bytes
from minimind.runtime.distributed import on_main, world_size
from minimind.trainer.footprint import announce_memory

# 走过这么多步就估全程用时（头一步含预热，不作数）；一步就要几十秒的，等不到那么久
FIRST_STEPS, SLOW_SECONDS = 3, 20.0


# ---------------------------------------------------------------- 文件


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """日志里验证的那一行：没有训练的 ``loss``，也不是样例。"""
    return "loss" not in record and "samples" not in record


def read_log(path: Path) -> list[dict[str, Any]]:
    """读一份日志；没有文件给空列表，写到一半的、坏了的行略过。

    只在换行符处分行：样例的文字里可以有 U+2028、U+0085，``str.splitlines`` 会在那里切开。
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # 被杀时写了一半；磁盘坏了，不是 UTF-8
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class RunLog:
    """``out/logs/{name}.jsonl``：每行一个 JSON 对象，都有 ``step``。

    重新训练时从空文件开始；续训时删去超过续训点的行再接着写，所以被杀过多少次，记录都和没被杀过一样。

    Args:
        path: 文件位置。
        keep_until: 续训点的步数；``None`` 表示重新训练。
    """

    def __init__(self, path: Path, keep_until: int | None = None):
        self.path = path
        kept = [] if keep_until is None else self._lines_until(keep_until)
        self.evaluations = [record for record in kept if is_evaluation(record)]
        # 样例写在验证的那一行之前：停在两行之间的，续训会补上验证，样例也重来
        kept = [
            record for record in kept if "samples" not in record or record["step"] in self.evaluated_steps
        ]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        atomic_write(path, lambda file: file.write(text.encode()))

    @property
    def evaluated_steps(self) -> set[int]:
        """已经验证过的步。"""
        return {record["step"] for record in self.evaluations}

    def _lines_until(self, step: int) -> list[dict[str, Any]]:
        return [record for record in read_log(self.path) if record["step"] <= step]

    def write(self, record: dict[str, Any]) -> None:
        """追加一行；NaN 与无穷写成 null，保证是合法 JSON。"""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        if is_evaluation(clean):
            self.evaluations.append(clean)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"写训练记录失败（{error.strerror}）",
                where=str(self.path),
                fix="腾出磁盘空间或换 --save_dir 后加 --from_resume 1 继续",
            ) from error


@dataclass
class Journal:
    """一次训练的 JSON 行日志与记录工具（:mod:`minimind.trainer.tracking`）；``log`` 与 ``tracker`` 只在主进程上有。"""

    path: Path
    log: RunLog | None
    tracker: Any = None
    told_total: bool = False

    @classmethod
    def open(cls, args: Any, name: str, keep_until: int | None, tracker_id: str | None) -> Journal:
        """重新训练时从空的开始，续训时接在存档那一步（``keep_until``）之后；``name`` 是权重的名字。"""
        folder = resolve_path(args.save_dir) / "logs"
        kind = "swanlab" if args.use_wandb and args.tracker == "none" else args.tracker

        def open_both() -> tuple[RunLog, Any]:
            log = RunLog(folder / f"{name}.jsonl", keep_until)
            if kind == "none":
                return log, None
            from minimind.trainer.tracking import start_tracker  # 不用记录工具的不必读它

            config = {k: v for k, v in vars(args).items() if not k.startswith("_")}
            project = args.wandb_project
            return log, start_tracker(
                kind, project=project, run_name=name, folder=folder, config=config, run_id=tracker_id
            )

        return cls(folder / f"{name}.jsonl", *(on_main(open_both) or (None, None)))

    def write(self, record: dict[str, Any], step: int) -> None:
        """主进程写一行 JSON；其中的数也交给记录工具。"""
        if self.log is not None:
            self.log.write(record)
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
            values = {k: v for k, v in numbers.items() if k != "step" and math.isfinite(v)}
            if values and self.tracker is not None:  # 样例的行里没有数
                self.tracker.log(values, step)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()


def write_card(log_path: Path, card: dict[str, Any]) -> None:
    """日志旁边的卡片 ``{name}.card.json``：配方、总步数之类，日志的行里没有的；看训练的页面靠它知道还剩多少。"""
    text = json.dumps(card, ensure_ascii=False, indent=1) + "\n"
    atomic_write(log_path.with_suffix(".card.json"), lambda file: file.write(text.encode()))


# ---------------------------------------------------------------- 话


def announce(run: Any) -> None:
    """开始前的一段话：模型、数据、步数、精度、设备；日志旁边写下卡片。``run`` 是 :class:`minimind.trainer.recipe.Run`。"""
    args, data, peak = run.args, run.data, run.numerics["peak_flops"]
    row_length, documents = (getattr(data.train, k, 0) for k in ("row_length", "num_documents"))
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    say(
        f"模型：{count_parameters(run.model) / 1e6:.2f}M 参数（训练 {trainable / 1e6:.2f}M），"
        f"{run.recipe.weights.name}"
    )
    say(
        f"数据：{len(data.train):,} "
        + (f"行 × {row_length} 词元，{documents:,} 篇文档" if row_length else "条")
        + (f"；验证 {len(data.val):,} 行" if data.val is not None else "")
    )
    say(
        f"训练：{args.epochs} 轮，共 {run.state.total_steps:,} 步，"
        f"每步 {run.state.global_batch * args.accumulation_steps} 行"
        f"（{args.batch_size} × {args.accumulation_steps} 累积 × {world_size()} 进程），"
        f"{args.optimizer}，学习率 {args.learning_rate:g}，{args.schedule}"
    )
    say(
        f"设备：{device_name(run.device)}，精度 {run.numerics['dtype']}"
        + (f"，矩阵乘峰值 {peak / 1e12:.2f} TFLOPS" if peak else "")
    )
    announce_memory(run)
    if run.journal.log is not None:
        card = {
            "recipe": run.recipe.name,
            "total_steps": run.state.total_steps,
            "epochs": args.epochs,
            "processes": world_size(),
            "parameters": count_parameters(run.model),
            "device": run.device.type,
            "dtype": run.numerics["dtype"],
        }
        write_card(run.journal.path, card)


def announce_total(run: Any) -> None:
    """尽早说一声全程要多久，只说一次。"""
    meter = run.meter
    training = meter.elapsed() - sum(meter.pauses["compile"])
    if run.journal.told_total or (meter.seen < FIRST_STEPS and training < SLOW_SECONDS):
        return
    run.journal.told_total = True
    say(f"按现在的速度，本次全程约 {format_duration(meter.elapsed() + seconds_left(run))}（含验证与存盘）。")


def seconds_left(run: Any) -> float:
    """按现在的速度还要多久，含验证与存盘。"""
    evals, saves = run.state.pauses_left()
    steps = run.state.total_steps - run.state.step
    return run.meter.seconds_left(steps, evals if run.evaluates else 0, saves)


def log_interval(run: Any, epoch: int) -> None:
    """打印一行，写一行 JSON；看体征，有毛病就说。``epoch`` 是这一步所在的轮，从 0 数。"""
    args, state, sums = run.args, run.state, run.state.interval
    state.train_loss = sums["loss"] / sums["count"] if sums.get("count") else math.nan
    speed = sums.get("tokens", 0.0) / max(sums["seconds"], 1e-9)
    extras = interval_metrics(sums)
    record: dict[str, Any] = {
        "step": state.step,
        "epoch": epoch + 1,
        "loss": state.train_loss,
        "lr": state.lr,
        "grad_norm": sums.get("grad_norm", math.nan) / max(sums.get("steps", 0.0), 1.0),
        "tokens": int(state.tokens),
        "tokens_per_s": speed,
        "time": state.seconds,
        **extras,
    }
    if sums.get("skipped"):
        record["skipped_steps"] = int(sums["skipped"])
    peak = run.numerics["peak_flops"]
    if peak and isinstance(run.config, MiniMindConfig):
        # 词元平均所在的段长决定注意力的代价
        context = sums.get("context", 0.0) / max(sums.get("tokens", 0.0), 1.0)
        if flops := speed * flops_per_token(run.config, context):
            record["mfu"] = flops / (peak * world_size())
    if sums.get("zero_grad"):
        record["zero_grad_steps"] = int(sums["zero_grad"])
    notes = run.vitals.examine(
        record,
        cross_entropy=run.recipe.cross_entropy,
        vocab_size=run.config.vocab_size,
        warm=state.step - max(args.log_interval, 1) >= args.warmup_ratio * state.total_steps,
        updates=sums.get("steps", 0.0),
        group_lrs=[group["lr"] for group in run.optimizer.param_groups],
    )
    if notes:
        record["notes"] = notes
    run.journal.write(record, state.step)
    metrics = "".join(f" {k} {v:.4f}" for k, v in extras.items())
    loss = "无（这一段没有可学的目标）" if math.isnan(state.train_loss) else f"{state.train_loss:.4f}"
    say(
        f"第 {epoch + 1}/{args.epochs} 轮 {state.step}/{state.total_steps} 步 loss {loss}{metrics}"
        f" lr {state.lr:.2e} {speed:,.0f} 词元/秒"
        + (f" 利用率 {record['mfu']:.0%}" if "mfu" in record else "")
        + f" 剩余 {format_duration(seconds_left(run))}"
    )
    state.interval.clear()
    for sentence in [*notes, *(run.recipe.health(record) if run.recipe.health else ())]:
        say(f"留意：{sentence}")


def interval_metrics(sums: dict[str, float]) -> dict[str, float]:
    """``name/sum`` 与 ``name/count`` 合成平均值；一个也没有的项不出现。"""
    names = [key.removesuffix("/sum") for key in sums if key.endswith("/sum")]
    return {name: sums[f"{name}/sum"] / sums[f"{name}/count"] for name in names if sums[f"{name}/count"]}


def conclude(run: Any) -> None:
    """结束时的一句总结。"""
    state = run.state
    say(
        f"训练完成：{state.step} 步，{state.tokens:,.0f} 词元，本次用时 {format_duration(run.meter.elapsed())}，"
        f"内存最高 {peak_memory_bytes(run.device) / 2**30:.2f} GB；权重 {run.recipe.weights}"
    )
