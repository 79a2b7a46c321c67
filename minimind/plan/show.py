"""把计划说出来、写进 plan.json，照着它跑。"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path

from minimind.console import format_duration, say
from minimind.errors import UserError
from minimind.model import preset
from minimind.plan.arguments import PlanArguments
from minimind.plan.cards import CARD_GB
from minimind.plan.follow import StageStopped, follow, log_of
from minimind.plan.planning import LENGTH, Leg, Plan, set_steps, worth
from minimind.plan.quality import predict, untrained
from minimind.report.logs import read_log
from minimind.runtime.files import write_text


def show(plan: Plan, args: PlanArguments) -> None:
    """计划走 stdout。"""
    batch, measured = plan.batch, plan.measured
    lines = [
        f"设备　　{measured['place']}，{measured['dtype']}，{measured['tokens_per_second']:,.0f} 词元/秒",
        f"尺寸　　--preset {plan.preset}，{plan.parameters / 1e6:.1f}M 参数",
        f"每步　　{batch.rows} 行 × {LENGTH}"
        + (f" × {batch.accumulation} 次累积" if batch.accumulation > 1 else "")
        + ("，重算各层" if batch.checkpoint_layers != "0" else "")
        + f"；内存约 {plan.memory_gb:.1f} GB"
        + (f"（能用 {measured['room_gb']:.1f}）" if measured["room_gb"] else "（能用多少问不到）"),
    ]
    for stage in plan.stages:
        lines.append(
            f"{stage.title}".ljust(4, "　")
            + f"{stage.steps:,} 步，{stage.tokens / 1e6:.3g} M 词元（数据的 {times(stage.epochs)} 遍），{format_duration(stage.seconds)}"
        )
    lines += [
        f"一共　　{format_duration(plan.seconds)}（要的是 {format_duration(60 * args.minutes)}）",
        f"预期　　预训练结束时每字节比特数 {plan.quality.words()}",
    ]
    lines += [f"留意　　{note}。" for note in [*plan.quality.notes(), *plan.notes]]
    lines += ["", "照抄就能跑："] + [f"  {stage.command}" for stage in plan.stages]
    last = "sft" if len(plan.stages) > 1 else "pretrain"
    weight = {"sft": "full_sft", "pretrain": "pretrain"}[last]
    lines.append(
        f"然后对话：{shlex.join(['minimind', 'chat', '--save_dir', args.save_dir, '--weight', weight])}"
    )
    print("\n".join(lines), flush=True)


def times(epochs: float) -> str:
    """几遍：小的两位有效数字，大的整数。"""
    return f"{epochs:.2g}" if epochs < 10 else f"{epochs:,.0f}"


def write_plan(plan: Plan, args: PlanArguments, folder: Path, actual: dict | None = None) -> Path:
    """``plan.json``：计划与测得的数；跑过之后另有实际的。"""
    record = asdict(plan)
    record["commands"] = [stage.command for stage in plan.stages]
    record |= {"minutes": args.minutes, "seconds": plan.seconds}
    if actual:
        record["actual"] = actual
    path = folder / "plan.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    return path


def go(plan: Plan, args: PlanArguments, folder: Path) -> None:
    """一条接一条地跑，时间照计划；最后把实际与计划比一比。

    Raises:
        UserError: 计划是给别的卡的；有一条没有跑成。
        StageStopped: 中途收到退出信号，训练已存盘；说过怎么接着走。
    """
    if plan.measured["place"] in CARD_GB:
        raise UserError(
            f"计划是给 {plan.measured['place']} 的，不在这台机器上",
            where="--go",
            fix="去掉 --go 1，把命令拿到那台机器上跑；或用 --device auto 在这里跑",
        )
    total, start = plan.budget, time.perf_counter()
    stages: list[Leg] = []
    spent: list[float] = []
    for number, stage in enumerate(plan.stages, 1):
        left = total - (time.perf_counter() - start)
        later = sum(one.seconds for one in plan.stages[number:])
        seconds = left - later if later else left
        stage = paced(stage, seconds, stages, spent, plan)
        say(
            f"\n[{number}/{len(plan.stages)}] {stage.title}，{format_duration(seconds)}"
            f"（全程剩余 {format_duration(left)}）：{stage.command}"
        )
        begin = time.perf_counter()
        try:
            stages.append(follow(stage, seconds, folder, plan.costs, plan.batch))
        except StageStopped as stopped:
            rest = [stopped.command, *(one.command for one in plan.stages[number:])]
            if rest := [one for one in rest if one]:
                say(f"\n停在{stage.title}。接着走，照抄：" + "".join(f"\n  {one}" for one in rest))
            raise
        spent.append(time.perf_counter() - begin)
    conclude(plan, args, folder, stages, spent, time.perf_counter() - start)


def paced(stage: Leg, seconds: float, done: list[Leg], spent: list[float], plan: Plan) -> Leg:
    """后一段开始之前，照前一段实际的快慢改步数；第一段照计划。"""
    if not done:
        return stage
    faster = done[-1].seconds / max(spent[-1], 1e-9)  # 前一段按测的速度该要几秒，实际几秒
    wanted = round(stage.steps * faster * seconds / stage.seconds)
    steps = max(wanted // stage.validations * stage.validations, stage.validations)
    return stage if abs(steps - stage.steps) <= 0.05 * stage.steps else set_steps(stage, steps, plan.batch)


def conclude(
    plan: Plan, args: PlanArguments, folder: Path, stages: list[Leg], spent: list[float], seconds: float
) -> None:
    """比一比：用时，每字节比特数在不在区间里（按实际走的词元数），写进 plan.json。"""
    bpb, planned, tokens = last_bpb(folder, stages[0]), plan.stages[0].tokens, stages[0].tokens
    expected = plan.quality
    if tokens != planned:
        amount = worth(tokens, plan.measured["data_tokens"])
        expected = predict(expected.data, plan.parameters, amount, plan.measured["squeezed_ratio"])
        most = untrained(preset(plan.preset).vocab_size, plan.measured["bytes_per_token"])
        expected = expected.capped(most)
    actual = {
        "seconds": seconds, "stage_seconds": spent, "bpb": bpb,
        "steps": [stage.steps for stage in stages], "tokens": [stage.tokens for stage in stages],
        "expected": asdict(expected),
    }  # fmt: skip
    path = write_plan(plan, args, folder, actual)
    line = f"用时 {format_duration(seconds)}，要的是 {format_duration(60 * args.minutes)}（{seconds / 60 / args.minutes - 1:+.0%}）"
    if bpb is not None:
        inside = expected.low <= bpb <= expected.high
        line += f"；每字节比特数 {bpb:.3f}，预期 {expected.words()}，{'在区间里' if inside else '不在区间里'}"
    if tokens != planned:
        line += f"；机器的快慢变了，预训练走了 {tokens / 1e6:.3g} M 词元，原计划 {planned / 1e6:.3g} M"
    say(f"\n{line}。记录在 {path}")


def last_bpb(folder: Path, stage: Leg) -> float | None:
    """预训练最后一次验证的每字节比特数；太少没有验证集时为 None。"""
    log = log_of(folder, stage)
    records = read_log(log) if log else []
    found = [one["val_bpb"] for one in records if one["step"] == stage.steps and "val_bpb" in one]
    return found[-1] if found else None
