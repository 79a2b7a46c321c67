"""把时间分给预训练与微调，写成命令。"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.model import count_parameters, preset
from minimind.paths import base_dir
from minimind.plan import cards, measure, planning, quality
from minimind.plan.arguments import PlanArguments
from minimind.plan.place import Place
from minimind.plan.planning import LENGTH, Batch, Costs, Leg, Plan
from minimind.trainer.footprint import GB, footprint
from minimind.trainer.train_args import TrainArguments

LINE_SECONDS = 5.0  # 每几秒一行日志，至多每十步
MANY_EPOCHS = 4  # 反复看到四遍还与新数据差不多


def run_flags(args: PlanArguments, place: Place, size: str, batch: Batch) -> list[str]:
    """预训练与微调共用的参数：尺寸、批、精度、设备。"""
    words = ["--preset", size, "--max_seq_len", str(LENGTH), *batch.flags()]
    if place.device is not None:
        words += ["--dtype", place.dtype]
        words += [] if args.device == "auto" else ["--device", args.device]
    return words


def arrange(
    args: PlanArguments,
    place: Place,
    size: str,
    batch: Batch,
    costs: Costs,
    pretrain: tuple[Any, Any, measure.DataSize],
    sft: tuple[Any, Any] | None,
    sft_data: measure.DataSize | None,
    spent: float,
) -> Plan:
    """把时间分给预训练与微调，写成命令。"""
    seconds, stages, notes = 60 * args.minutes, [], []
    common = run_flags(args, place, size, batch)
    if sft is not None and sft_data is not None:
        cost = replace(costs, tokenize=sft_data.tokenize_seconds)
        stage = sft_stage(args, common, batch, cost, sft, sft_data)
        stages += [stage] if stage else []
    left = seconds - sum(stage.seconds for stage in stages)
    path, val_path, data = pretrain
    steps, rows = planning.steps_within(left, costs, batch, planning.VALIDATIONS)
    most = int(planning.MOST_EPOCHS * data.tokens / batch.positions)
    most = max(most // planning.VALIDATIONS * planning.VALIDATIONS, planning.FEWEST_STEPS)
    short = steps > most
    steps = min(steps, most)
    stages.insert(
        0,
        make_stage(
            "预训练",
            "pretrain",
            [*files(path, val_path), *common],
            steps,
            rows,
            planning.VALIDATIONS,
            batch,
            costs,
            data,
            args,
        ),
    )
    parameters = count_parameters(planning.blank(size))
    kind = "microworld" if is_microworld(path) else "zh"
    ratio = data.squeezed_bits / quality.SQUEEZED[kind]
    found = quality.predict(kind, parameters, planning.worth(stages[0].tokens, data.tokens), ratio)
    most = quality.untrained(preset(size).vocab_size, data.bytes_per_token)
    spent_on_all = sum(stage.seconds for stage in stages)
    if short:
        notes.append(
            f"数据只有 {data.tokens / 1e6:.3g} M 词元，看 {planning.MOST_EPOCHS} 遍就到头，用不完 {args.minutes:g} 分钟；"
            "要用满，换更多的数据（minimind data download，或 --data_path）"
        )
    elif stages[0].epochs > MANY_EPOCHS:
        notes.append(
            f"数据只有 {data.tokens / 1e6:.3g} M 词元，要看 {stages[0].epochs:.1f} 遍；超过 {MANY_EPOCHS} 遍收益递减，"
            "预期的数打过折扣"
        )
    if sft is None and not args.sft_path:
        notes.append("给了 --data_path 而没有 --sft_path，只做预训练：得到的模型会续写，不会对话")
    elif len(stages) == 1 and sft_data is not None and sft_steps(sft_data, batch) < planning.FEWEST_STEPS:
        notes.append(
            f"微调数据只有 {sft_data.tokens / 1e6:.3g} M 词元，看 {planning.SFT_EPOCHS} 遍也走不满 {planning.FEWEST_STEPS} 步，"
            "只做预训练：得到的模型会续写，不会对话"
        )
    elif len(stages) == 1:
        notes.append("时间不够再微调，只做预训练：得到的模型会续写，不会对话")
    needed = memory_gb(size, batch, place)
    measured = {
        "place": place.name, "dtype": place.dtype, "room_gb": place.room_gb, "needed_gb": needed,
        "measuring_seconds": spent, "tokens_per_second": batch.positions / costs.step,
        "data_tokens": data.tokens, "bytes_per_token": data.bytes_per_token, "squeezed_bits": data.squeezed_bits,
        "squeezed_ratio": ratio,
    }  # fmt: skip
    if place.device is None:
        notes.append(
            f"{cards.NOT_RUN}：峰值 {cards.peak_of(place.name) / 1e12:g} TFLOP/s 是公布的，利用率 "
            f"{cards.UTILISATION[size]:.1%} 是假设（{cards.source_of(size)}），分词按本机的快慢"
        )
    budget = spent_on_all if short else seconds
    return Plan(size, parameters, budget, batch, costs, needed, stages, found.capped(most), measured, notes)


def memory_gb(size: str, batch: Batch, place: Place) -> float:
    """预计的最高值，GB。"""
    found = footprint(
        planning.blank(size),
        batch.rows * LENGTH,
        checkpoint_layers=batch.checkpoint_layers,
        accumulates=batch.accumulation > 1,
        **place.memory_options,
    )
    return found.peak / GB


def files(path: Any, val_path: Any) -> list[str]:
    words = ["--data_path", written(path)]
    return words if val_path is None else [*words, "--val_path", written(val_path)]


def make_stage(
    title: str,
    command: str,
    words: list[str],
    steps: int,
    rows: int,
    validations: int,
    batch: Batch,
    costs: Costs,
    data: measure.DataSize,
    args: PlanArguments,
) -> Leg:
    """一条命令与它要多久。"""
    tokens = steps * batch.positions
    epochs = tokens / max(data.tokens, 1)
    lines = min(max(round(LINE_SECONDS / costs.step), 1), TrainArguments.log_interval)
    words = [command, *words, *planning.schedule_flags(steps, validations, epochs)]
    words += ["--log_interval", str(lines), "--val_max_rows", str(rows)]
    words += ["--save_dir", args.save_dir, "--checkpoint_dir", str(Path(args.save_dir) / "checkpoints")]
    seconds = costs.of(steps, validations, rows, batch)
    return Leg(title, words, steps, tokens, epochs, seconds, validations, rows)


def sft_stage(
    args: PlanArguments,
    common: list[str],
    batch: Batch,
    costs: Costs,
    sft: tuple[Any, Any],
    data: measure.DataSize,
) -> Leg | None:
    """两成时间的微调，至多三轮；走不了几步就不要。"""
    count = planning.SFT_VALIDATIONS
    try:
        steps, rows = planning.steps_within(60 * args.minutes * planning.SFT_SHARE, costs, batch, count)
    except UserError:
        return None
    steps = min(steps, sft_steps(data, batch))
    if steps < planning.FEWEST_STEPS:
        return None
    words = [*files(*sft), "--from_weight", "pretrain", *common]
    return make_stage("微调", "sft", words, steps, rows, count, batch, costs, data, args)


def sft_steps(data: measure.DataSize, batch: Batch) -> int:
    """微调数据看满 :data:`planning.SFT_EPOCHS` 遍走几步，取验证次数的整数倍。"""
    count = planning.SFT_VALIDATIONS
    return int(planning.SFT_EPOCHS * data.tokens / batch.positions) // count * count


def is_microworld(path: Any) -> bool:
    """内置的微世界语料，原来的规模：拟合用的就是它。"""
    path = Path(path)
    try:
        meta = json.loads((path.parent / "meta.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    heldout = (path.parent / "pretrain_heldout.jsonl").is_file()
    return path.name == "pretrain.jsonl" and heldout and isinstance(meta, dict) and meta.get("scale") == 1.0


def written(path: Any) -> str:
    """写进命令里的路径：起点之下的写相对的，几个文件的照原样。"""
    path = str(path)
    inside = os.path.isabs(path) and Path(path).is_relative_to(base_dir())
    return str(Path(path).relative_to(base_dir())) if inside else path
