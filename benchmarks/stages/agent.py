"""带工具的强化学习：先微调出调用的样子（各种子各一次），再走 train_agent；对照是同样的题、同样多的采样，不给工具的一问一答 GRPO。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench_stages import Bench, Goal, Outcome
from stages._agent import Exam, ask, corpus, exam, heldout, heldout_curve, kinds, one_turn, write

from minimind.evaluate.errands import solved
from minimind.microworld.core import TRAIN
from minimind.recipes import agent, full_sft, grpo

TITLE = "带工具的强化学习：什么时候用、用到哪一步"
FIGURE = {
    "title": "Errands, tiny model",
    "x": "conversations sampled",
    "y": "solved (held out, greedy)",
}
WHEN = {"sft": "微调后", "agent": "train_agent 后"}
GOALS = [
    Goal("sft", "要用工具的题：微调后", at_least=0.25),
    Goal("sft", "要用工具的题：微调后", at_most=0.60),
    Goal("agent", "要用工具的题：train_agent 后"),
    Goal("gain", "　多答对多少", at_least=0.25),
    Goal("one_turn_gain", "　对照：不给工具的一问一答多答对多少"),
    Goal("one_turn", "　对照：答对"),
    Goal("chat_sft", "普通问答：微调后"),
    Goal("chat_change", "　train_agent 之后变了多少", at_least=-0.03),
    Goal("none_sft", "给了工具用不着的题：微调后"),
    Goal("none_change", "　train_agent 之后变了多少", at_least=-0.03),
    Goal("valid_calls", "合乎说明的调用", at_least=0.98),
    Goal("unfinished", "没写完的", at_most=0.02),
    *(Goal(f"{when}_{task}", f"{title}：{WHEN[when]}") for task, title in kinds() for when in WHEN),
]
# 每步 8 题 × 8 段；--steps 可改
STEPS, PROMPTS, GENERATIONS = 20, 8, 8


def common(bench: Bench, seed: int, folder: Path) -> dict[str, Any]:
    """三次训练共用的；数据各给各的。"""
    skip = ("data_path", "val_path")
    return {k: v for k, v in bench.common(seed, folder, "agent").items() if k not in skip}


def tuning(bench: Bench, seed: int, folder: Path) -> full_sft.SFTArguments:
    """教会调用的样子；演示里用的就是这一组。"""
    return full_sft.SFTArguments(
        **common(bench, seed, folder),
        data_path=str(write(folder / "agent_sft.jsonl", corpus(bench).agent_sft(TRAIN))),
        from_weight="full_sft",
        save_weight="agent_sft",
        max_seq_len=512,
        batch_size=4,
        epochs=1,
        learning_rate=2e-3,
        eval_interval=0,
    )


def sampling(bench: Bench) -> dict[str, Any]:
    """train_agent 与对照一样的：起点、题数、遍数、步数与学习率。"""
    steps = bench.args.steps or STEPS
    return {
        "from_weight": "agent_sft",
        "batch_size": PROMPTS,
        "num_generations": GENERATIONS,
        "accumulation_steps": 1,
        "dynamic_sampling": 1,
        "epochs": 1 + steps * PROMPTS // 1500,
        "max_steps": steps,
        "learning_rate": 5e-4,
        "max_gen_len": 48,
        "max_seq_len": 480,
        "log_interval": 1,
        "eval_interval": max(steps // 2, 1),
        "val_max_rows": 120,
    }


def settings(bench: Bench, seed: int, folder: Path) -> agent.AgentArguments:
    """走几回合的。"""
    return agent.AgentArguments(
        **common(bench, seed, folder),
        **sampling(bench),
        data_path=str(write(folder / "agent.jsonl", corpus(bench).agent(TRAIN))),
        val_path=str(write(folder / "agent_heldout.jsonl", heldout(bench))),
        max_turns=4,  # 两步的要三回合，另留一回合改正
        max_total_len=600,
    )


def one_turn_settings(bench: Bench, seed: int, folder: Path) -> grpo.GRPOArguments:
    """对照：同样的题去掉工具，一问一答。"""
    return grpo.GRPOArguments(
        **common(bench, seed, folder),
        **sampling(bench),
        data_path=str(write(folder / "one_turn.jsonl", one_turn(corpus(bench).agent(TRAIN)))),
        val_path=str(write(folder / "one_turn_heldout.jsonl", one_turn(heldout(bench)))),
    )


def learn(bench: Bench, seed: int, folder: Path) -> tuple[Exam, Exam, Path]:
    """微调，再走 train_agent：``(微调后的考试, 之后的考试, 日志)``。"""
    full_sft.run(tuning(bench, seed, folder))
    arguments = settings(bench, seed, folder)
    before = exam(bench, folder, "agent_sft", arguments)
    result = agent.run(arguments)
    return before, exam(bench, folder, "agent", arguments), result.log


def control(bench: Bench, seed: int, folder: Path) -> tuple[float, float, Path]:
    """从同一份微调走对照：``(训练前答对, 之后答对, 日志)``，都不给工具。"""
    before = ask(bench, folder, "agent_sft")
    result = grpo.run(one_turn_settings(bench, seed, folder))
    return before, ask(bench, folder, "grpo"), result.log


def run(bench: Bench, seed: int) -> Outcome:
    """微调一次，从它走 train_agent 与对照各一次，三个都考。"""
    folder = bench.folder(seed)
    return outcome(*learn(bench, seed, folder), *control(bench, seed, folder))


def outcome(
    before: Exam, after: Exam, log: Path, plain_before: float, plain_after: float, plain_log: Path
) -> Outcome:
    """两边的考试与日志 → 各指标与曲线。"""
    start, end = solved(before.tasks), solved(after.tasks)
    metrics = {f"sft_{task}": share for task, share in before.tasks.items()}
    metrics |= {f"agent_{task}": share for task, share in after.tasks.items()}
    metrics |= {
        "sft": start,
        "agent": end,
        "gain": end - start,
        "one_turn": plain_after,
        "one_turn_gain": plain_after - plain_before,
        "chat_sft": before.chat,
        "chat_change": after.chat - before.chat,
        "none_sft": before.tasks["agent_none"],
        "none_change": after.tasks["agent_none"] - before.tasks["agent_none"],
        "valid_calls_sft": before.signs["valid_calls"],
        "valid_calls": after.signs["valid_calls"],
        "unfinished_sft": before.signs["unfinished"],
        "unfinished": after.signs["unfinished"],
    }
    each = PROMPTS * GENERATIONS
    curves = {
        "train_agent": [[0, before.signs["success"]], *heldout_curve(log, "val_success", each)],
        "one turn, no tools": heldout_curve(plain_log, "val_reward", each),
    }
    return Outcome(metrics, curves, notes={"samples": after.samples})
