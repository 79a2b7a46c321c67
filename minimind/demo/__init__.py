"""演示：从零走完全程，十几分钟后得到一个会答题的小模型、八种后训练各自的效果，和一份成绩单。

造数据 → 预训练 → 监督微调 → LoRA、DPO、蒸馏、推理 → PPO、GRPO、SPO → 差事（工具）→ 报告 → 对话。每一步都是正式命令用的
同一段代码，只是尺寸小、数据是内置的微世界。产物在 ``out/demo``，不碰使用者自己的权重。

一个阶段没走完不连累别的：说清原因，接着走下一个，报告里写着到此为止的结果。
"""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.arguments import declared, parse_args
from minimind.console import console, format_duration, say
from minimind.demo.arguments import ROW_LENGTH, DemoArguments
from minimind.demo.explain import explain_last, show_explanations
from minimind.demo.pace import LEAST, Timetable, fit_pace, probe_speed
from minimind.errors import UserError, guard
from minimind.paths import resolve_path

if TYPE_CHECKING:
    from minimind.demo.road import Road
    from minimind.demo.stages import Lesson

# 互相比的：采样的条数要相同，走几成随第一个
SAME_AMOUNT = ("ppo", "grpo", "spo")
# 谁先省：前面的先省到 SPARED，还放不进去，后一组才跟着少走。强化学习走六成的那次几乎没有动，走 68 % 涨二十个点
# （docs/demo.md）；底子没打好，哪一段都看不出，所以预训练与微调最后
YIELDING, SPARED = (("distill", "reason"), SAME_AMOUNT, ("pretrain", "sft")), 0.5
# 报告里的这几样相同，才是同一次演示的几段
SAME_RUN = ("模型", "种子与规模", "权重目录")
# 总是走满的：本来就短，或少走就看不出效果
WHOLE = ("lora", "dpo", "agent")


def open_road(args: DemoArguments) -> Road:
    """写好语料、读出考卷。"""
    from minimind.demo.exam import open_papers
    from minimind.demo.road import Road
    from minimind.microworld import ensure_microworld
    from minimind.report.report import Report

    folder = resolve_path(args.out_dir) / "microworld"
    say(f"写微世界语料到 {folder}……")
    world = ensure_microworld(args.scale, args.seed, folder)
    papers = open_papers(world, args.items_per_task, bool(args.fast))
    return Road(args, world, papers, Report("MiniMind 演示成绩单"))


def plan(road: Road, stages: dict[str, Lesson], start: float) -> Timetable:
    """测速并排出时间表；选好的线程数与精度就地生效，没训练过的模型也在这里考。

    Args:
        start: 全程开始的时刻（``time.perf_counter``）。
    """
    import torch

    from minimind.dataset import DPODataset, PretrainDataset, SFTDataset
    from minimind.demo.base import heldout_bpb, pretrain_arguments
    from minimind.model import count_parameters
    from minimind.runtime.device import device_name
    from minimind.trainer.trainer_utils import init_model, model_config, start_run

    settings = pretrain_arguments(road)
    device = start_run(settings)

    def fresh_model():
        return init_model(model_config(settings), "none", None, road.args.out_dir, device)

    model, tokenizer = fresh_model()

    def packed(cls, name: str, row_length: int = ROW_LENGTH):
        return cls(road.data(name)["data_path"], tokenizer, max_length=row_length)

    pretrain_rows = packed(PretrainDataset, "pretrain")
    pairs = packed(DPODataset, "dpo")
    road.rows = {
        "pretrain": len(pretrain_rows),
        "sft": len(packed(SFTDataset, "sft")),
        "lora_identity": len(packed(SFTDataset, "lora_identity")),
        "agent_sft": 2 * len(packed(SFTDataset, "agent_sft", 2 * ROW_LENGTH)),
        # 参考模型多算一遍前向，一对两条补齐到一样长
        "dpo": round(int(pairs.cache.offsets[-1]) * 2 / ROW_LENGTH),
    }
    say("测速……")
    road.dtype, speed = probe_speed(model, pretrain_rows, road.args.batch_size, ROW_LENGTH)
    start_run(settings)  # 测速动过随机数与权重，重新开始
    if "pretrain" in stages:
        road.untrained_bpb = heldout_bpb(road, *fresh_model())
    clock = Timetable({name: stage.tokens(road) / speed for name, stage in stages.items()}, speed, start)
    whole = clock.expected
    keep_time(road, stages, clock)
    clock.expected = clock.elapsed() + clock.left()
    road.report.facts |= {
        "设备": f"{device_name(device)}，{road.dtype}",
        "PyTorch": torch.__version__,
        "模型": f"{road.args.preset}，{count_parameters(model) / 1e6:.2f}M 参数",
        "种子与规模": f"{road.args.seed}，{road.args.scale:g}",
        "权重目录": str(resolve_path(road.args.out_dir)),
    }
    say(f"{speed:,.0f} 词元/秒（{road.dtype}）；全程预计 {format_duration(clock.expected)}。")
    if whole > 60 * road.args.minutes > 0:
        say(
            f"走满要 {format_duration(whole)}；按 --minutes {road.args.minutes:g}，"
            "几段少走几步：先省蒸馏与推理，再省强化学习，底子最后（--minutes 0 走满）。"
        )
        if clock.expected > 60 * road.args.minutes:
            say(f"最少走{LEAST * 10:g}成也要 {format_duration(clock.expected)}，超过 --minutes 了。")
    return clock


def keep_time(road: Road, stages: dict[str, Lesson], clock: Timetable) -> None:
    """照 ``--minutes`` 定剩下的各段走几成（谁先省见 ``YIELDING``），改时间表；快慢按走完的几段修正。"""
    left = {name: stage for name, stage in stages.items() if name not in clock.actual}
    if not (road.args.minutes and left):
        return

    paces = dict.fromkeys(left, 1.0)

    def estimates(changes: dict[str, float]) -> dict[str, float]:
        found = {}
        for name, stage in left.items():
            road.pace = (paces | changes)[name]
            found[name] = stage.tokens(road) / clock.speed
        return found

    def seconds(changes: dict[str, float]) -> float:
        return clock.ratio() * sum(estimates(changes).values())

    budget = 60 * road.args.minutes - clock.elapsed()
    for number in reversed(range(len(YIELDING))):  # 后省的先定：先省的都省到头，它还要省多少
        group = [name for name in YIELDING[number] if name in left]
        before = [name for names in YIELDING[:number] for name in names if name in left]

        def changed(share: float) -> dict[str, float]:
            return dict.fromkeys(group, share) | dict.fromkeys(before, min(share, SPARED))  # noqa: B023

        share = fit_pace(lambda share: seconds(changed(share)), budget)
        paces |= dict.fromkeys(group, share)
    clock.estimates |= estimates({})
    road.pace = paces[next(iter(left))]


def on_time(road: Road, stages: dict[str, Lesson], clock: Timetable) -> Iterator[tuple[str, Lesson]]:
    """依次给出各段，给出之前定好它走几成。"""
    compared = False
    for name, stage in stages.items():
        if not (compared and name in SAME_AMOUNT):
            keep_time(road, stages, clock)
        compared = compared or name in SAME_AMOUNT
        yield name, stage


def require_start(road: Road, name: str) -> None:
    """起点的权重要在，而且不是这一次没走完的那一段留下的旧权重。

    Args:
        name: 起点是哪个阶段，``pretrain`` 或 ``sft``。
    """
    from minimind.demo.stages import STAGES
    from minimind.runtime.weights import find_weights

    if STAGES[name].title in road.report.failures:
        raise UserError(f"起点“{STAGES[name].title}”没有走完", fix="先解决它")
    weight = {"pretrain": "pretrain", "sft": "full_sft"}[name]
    if not find_weights(weight, road.args.out_dir):
        raise UserError(
            f"没有起点 {weight} 的权重",
            where=str(resolve_path(road.args.out_dir)),
            fix=f"--stages 里加上 {name}，或用 --out_dir 指向走过它的目录",
        )


def keep_the_rest(road: Road, stages: dict[str, Lesson]) -> None:
    """只走几段时，报告目录里别的段上一次的成绩留着：补一段不该丢掉整张记分牌。

    尺寸、种子、目录不同的不是同一次，不接；从这一次重走的权重开始的各段也作废。有接不上的，旧的一份改名留着。
    """
    from minimind.demo.stages import STAGES
    from minimind.report.build import read_answers
    from minimind.report.report import Report

    folder = road.folder()
    old = Report.load(folder) if len(stages) < len(STAGES) else None
    if old is None:
        return
    same = all(old.facts.get(name) == road.report.facts.get(name) for name in SAME_RUN)
    stale = set(stages) if same else set(STAGES)
    for name, stage in STAGES.items():  # 课表的次序即依赖的次序
        if stage.needs in stale:
            stale.add(name)
    known = {stage.title for stage in STAGES.values()}
    old.metrics = [metric for metric in old.metrics if metric.stage in known]
    titles = [STAGES[name].title for name in stale]
    dropped = {metric.stage for metric in old.metrics if metric.stage in titles}
    if dropped - {stage.title for stage in stages.values()}:
        for name in ("report.json", "report.md", "answers.jsonl"):
            if (folder / name).is_file():
                (folder / name).replace(folder / f"old_{name}")
        why = "从重走的权重开始的几段作废" if same else f"{'、'.join(SAME_RUN)}不全相同，不是同一次演示"
        say(f"报告目录里上一次的成绩接不上（{why}），改名为 {folder / 'old_report.md'} 等留着。")
        if not same:
            return
        road.report.inherit(old, titles, numbers_only=True)  # 旧的图、回答、样例说的是旧的底子
    else:
        road.report.inherit(old, titles, numbers_only=False)
        road.answered_before = read_answers(folder / "answers.jsonl")
        road.recall_rewards(set(SAME_AMOUNT) - stale)
    if kept := list(dict.fromkeys(metric.stage for metric in road.report.metrics)):
        say(f"别的几段（{'、'.join(kept)}）的成绩照 {folder} 里上一次的。")


def walk(road: Road, name: str, stage: Lesson) -> str | None:
    """走一个阶段；出了错返回一句话，不连累别的阶段。"""
    road.title = stage.title
    metrics = len(road.report.metrics)
    try:
        if stage.needs:
            require_start(road, stage.needs)
        stage.run(road)
    except Exception as error:
        del road.report.metrics[metrics:]  # 只考了一半的不算
        log = resolve_path(road.args.out_dir) / "logs" / f"{name}.error.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}："
        return f"{kind}{error}（调用栈在 {log}）"
    return None


def run(args: DemoArguments) -> Path:
    """走完选中的阶段，返回 report.md 的路径。

    Raises:
        UserError: 有阶段没走完；别的阶段的结果已在报告里。
    """
    from minimind.demo.stages import STAGES
    from minimind.runtime.files import check_writable

    start = time.perf_counter()
    for name in ("out_dir", "report_dir"):  # 十几分钟之后才写的，现在就看写不写得了
        check_writable(resolve_path(getattr(args, name)), f"--{name}")
    stages = {name: STAGES[name] for name in args.chosen_stages()}
    road = open_road(args)
    clock = plan(road, stages, start)
    keep_the_rest(road, stages)
    facts, failed = road.report.facts, {}
    for name, stage in on_time(road, stages, clock):
        clock.begin(name, f"{stage.title}：{stage.doing}")
        try:
            problem = walk(road, name, stage)
        except (KeyboardInterrupt, SystemExit):
            rest = list(stages)[list(stages).index(name) :]
            say(f"\n停在“{stage.title}”。接着走（这一段从头）：{again_command(args, rest)}")
            raise
        clock.end(name)
        if problem:
            failed[stage.title] = road.report.failures[stage.title] = problem
            clock.estimates[name] = clock.actual[name]  # 没走完的不能用来估计快慢
            say(f"{stage.title}没有走完，接着走下一段。原因：{problem}")
        facts[stage.title] = format_duration(clock.actual[name]) + (
            f"（约走了安排的 {road.pace:.0%}）" if road.pace < 1 and name not in WHOLE else ""
        )
        facts.pop("全程", None)  # 总在最后一行
        facts["全程"] = f"{format_duration(clock.elapsed())}（开始时预计 {format_duration(clock.expected)}）"
        order = [stage.title for stage in STAGES.values()]
        road.report.metrics.sort(key=lambda metric: order.index(metric.stage))
        road.write_report()
    road.draw_scoreboard()
    path = road.write_report()
    console.print()
    console.print(road.report.scoreboard())
    if args.explain:
        show_explanations([asdict(metric) for metric in road.report.metrics])
    else:
        where = (
            ""
            if args.report_dir == DemoArguments.report_dir
            else f" --report_dir {shlex.quote(args.report_dir)}"
        )
        say(f"这些数是什么意思：minimind demo --explain last{where}（报告里也有）")
    say(f"报告：{path}")
    if failed:
        again = again_command(args, [name for name, stage in stages.items() if stage.title in failed])
        raise UserError(
            f"{'、'.join(failed)}没有走完，其余的结果在 {path}",
            where="；".join(f"{title}：{problem}" for title, problem in failed.items()),
            fix=f"解决之后只补这几段：{again}",
        )
    return path


def again_command(args: DemoArguments, names: list[str]) -> str:
    """只补这几段的命令：别的参数照这一次的写，换了尺寸、设备、种子就接不上了。"""
    words = ["minimind", "demo", "--stages", ",".join(names), "--out_dir", args.out_dir]
    implied = (
        "stages",
        "out_dir",
        *(("scale", "max_steps", "batch_size", "items_per_task") if args.fast else ()),
    )
    for field in declared(DemoArguments):
        if field.name not in implied and (value := getattr(args, field.name)) != field.default:
            words += [f"--{field.name}", str(value)]
    return shlex.join(words)


def open_chat(args: DemoArguments) -> None:
    """在终端里接着对话；没有终端（管道、持续集成）就什么也不做。"""
    say(f"再次对话：minimind chat --save_dir {shlex.quote(args.out_dir)} --temperature 0")
    if not (args.chat and sys.stdin.isatty() and sys.stdout.isatty()):
        return
    from minimind import chat

    say("\n可以问它微世界里的事了，例如：麦香镇的地标是什么？ 27+35 等于多少？ 你是谁？（空行退出）")
    chat_args = chat.ChatArguments(
        save_dir=args.out_dir, temperature=0.0, device=args.device, mode="manual", max_new_tokens=200
    )
    chat.run(chat.open_session(chat_args), chat_args)


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    args = parse_args(DemoArguments, argv)
    if args.explain == "last":
        explain_last(args.report_dir)
        return
    run(args)
    open_chat(args)
