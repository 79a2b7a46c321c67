"""画出一份计划：看数据，选设备与尺寸，测速，排步数，写命令。"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from minimind.console import say
from minimind.dataset import PretrainDataset, SFTDataset
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM, count_parameters, flops_per_token, preset
from minimind.plan import cards, measure, planning
from minimind.plan.arguments import PlanArguments
from minimind.plan.arrange import arrange, is_microworld, run_flags
from minimind.plan.place import Place, card_place, here
from minimind.plan.planning import LENGTH, Batch, Costs, Plan
from minimind.ranges import DEVICE
from minimind.recipes.entry import training_files
from minimind.runtime.device import resolve_device
from minimind.tokenizer import load_tokenizer

MEASURE_SECONDS = (6.0, 20.0)  # 测速几秒：计划的百分之一，不出这个范围
MEASURE_STEPS = (4, 60)
CARD_SAMPLE_SECONDS = 2.0


def draw_plan(args: PlanArguments) -> Plan:
    """按参数画出计划。

    Raises:
        UserError: 设备不认识，数据读不了，内存放不下，时间太短。
    """
    start = time.perf_counter()
    is_device = re.fullmatch(DEVICE[0], args.device)
    card = None if is_device else cards.find_card(args.device)
    device = resolve_device(args.device) if is_device else None
    path, val_path, sft = find_data(args)
    tokenizer = load_tokenizer()
    with tempfile.TemporaryDirectory(prefix="minimind-plan") as name:
        folder = Path(name)
        say("看数据，测速……")
        data = measure.size_up(PretrainDataset, str(path), folder, tokenizer, "--data_path", LENGTH)
        place = card_place(card, args) if card else here(device, args, data.sample, folder, tokenizer)
        size, batch = choose(args, place, data)
        if device is None:
            costs = card_costs(place, size, batch, data.tokenize_seconds)
        else:
            costs = measured_costs(args, place, size, batch, data, folder, tokenizer)
            batch, costs = resized(args, place, size, batch, costs, data)
        sft_data = None
        if sft is not None and args.minutes >= planning.SFT_MINUTES:
            sft_data = measure.size_up(SFTDataset, str(sft[0]), folder, tokenizer, "--sft_path", LENGTH)
    return arrange(
        args, place, size, batch, costs, (path, val_path, data), sft, sft_data, time.perf_counter() - start
    )


# ---------------------------------------------------------------- 数据


def find_data(args: PlanArguments) -> tuple[Any, Any, tuple[Any, Any] | None]:
    """``(预训练文件, 验证文件, (微调文件, 验证文件) 或 None)``，后者与预训练是一处来的才用。"""
    path, val_path = training_files("pretrain", args.data_path, None)
    if val_path is None and is_microworld(path):
        val_path = Path(path).parent / "pretrain_heldout.jsonl"
    if args.sft_path:
        return path, val_path, training_files("sft", args.sft_path, None)
    if args.data_path:
        return path, val_path, None
    sft = training_files("sft", None, None)
    return path, val_path, sft if Path(sft[0]).parent == Path(path).parent else None


def choose(args: PlanArguments, place: Place, data: measure.DataSize) -> tuple[str, Batch]:
    """尺寸与批。

    Raises:
        UserError: 最小的也放不下。
    """
    seconds = 60 * args.minutes
    most = planning.MOST_EPOCHS * data.tokens
    names = planning.choose_preset(args.preset, seconds, place.flops, most)
    for name in names:
        per_token = flops_per_token(preset(name), LENGTH / 2)
        positions = planning.positions_for(min(seconds * place.flops[name] / per_token, most))
        batch = planning.fit_batch(name, positions, place.room_gb, **place.memory_options)
        if batch is not None:
            return name, batch
    raise UserError(
        f"{place.room_gb:.2g} GB 内存放不下 {names[-1]}：每次只算一行、各层都重算也不够",
        where="--memory_gb" if args.memory_gb else place.name,
        expected=f"至少 {least_memory(names[-1], place):.1f} GB",
        fix="腾出内存，或换一个大一点的设备" + ("，或换 --preset tiny" if names[-1] != "tiny" else ""),
    )


def least_memory(name: str, place: Place) -> float:
    """一行一行地算、各层都重算，要多少 GB。"""
    room = 0.1
    while planning.fit_batch(name, LENGTH, room, **place.memory_options) is None:
        room += 0.1
    return room


# ---------------------------------------------------------------- 花费


def save_seconds(size: str) -> float:
    """存一次盘几秒。"""
    return 12 * count_parameters(planning.blank(size)) / planning.SAVE_BYTES_PER_SECOND


def card_costs(place: Place, size: str, batch: Batch, tokenize: float) -> Costs:
    """照公布的峰值与假设的利用率算；分词按本机的快慢。"""
    step = batch.positions * flops_per_token(preset(size), LENGTH / 2) / place.flops[size]
    return Costs(cards.CARD_START_SECONDS, tokenize, step, CARD_SAMPLE_SECONDS, save_seconds(size))


def measured_costs(
    args: PlanArguments,
    place: Place,
    size: str,
    batch: Batch,
    data: measure.DataSize,
    folder: Path,
    tokenizer: Any,
) -> Costs:
    """在子进程里真的训练几步，在本进程里答一次样例。"""
    low, high = MEASURE_SECONDS
    seconds = min(max(0.6 * args.minutes, low), high)
    guess = batch.positions * flops_per_token(preset(size), LENGTH / 2) / place.flops[size]
    steps = min(max(round(seconds / guess), MEASURE_STEPS[0]), MEASURE_STEPS[1]) + measure.WARMUP
    step, rest = measure.trial(run_flags(args, place, size, batch), data.sample, folder, steps)
    model = MiniMindForCausalLM(preset(size)).to(place.device)
    samples = measure.sampling_seconds(model, tokenizer, place.device)
    return Costs(rest, data.tokenize_seconds, step, samples, save_seconds(size))


def resized(
    args: PlanArguments, place: Place, size: str, batch: Batch, costs: Costs, data: measure.DataSize
) -> tuple[Batch, Costs]:
    """测了才知道走得了多少词元：一步该更大或更小就换，一步的时间按位置数折算。"""
    tokens = min(60 * args.minutes * batch.positions / costs.step, planning.MOST_EPOCHS * data.tokens)
    positions = planning.positions_for(tokens)
    better = planning.fit_batch(size, positions, place.room_gb, **place.memory_options)
    if better is None or positions == batch.positions:
        return batch, costs
    return better, replace(costs, step=costs.step * positions / batch.positions)
