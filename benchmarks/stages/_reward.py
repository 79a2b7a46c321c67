"""PPO、GRPO、SPO 去追奖励模型：先由偏好对训练奖励模型，再让模型回答、打分、更新；考的是判分器自己量的腔调与各任务的成绩。

提示是微世界训练部分的简单题，没有一个字说要客气；“客气”只在奖励模型里。奖励另加一份对错（``--reward auto:…,model``）：
只追口气时没有人管内容，题目会掉。
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_stages import Bench, Goal, Outcome
from stages import dpo

from minimind.microworld import build_tasks
from minimind.microworld.core import TRAIN, stream
from minimind.microworld.stages import Corpus, stylable
from minimind.recipes import reward
from minimind.report.logs import read_log

ROLLOUTS = 128
PROMPTS = 1500
GOALS = [
    Goal("accuracy", "奖励模型：留出的偏好对", at_least=0.90),
    Goal("polite", "留出的提问：写出的回答客气", at_least=0.30, change=True),
    Goal("grumpy", "留出的提问：写出的回答不耐烦"),
    Goal("tasks", "全部简单题答对", at_least=-0.05, change=True),
    Goal("finished", "回答写出了结束符"),
]
# 几个算法画法相同，只有标题不同
FIGURE = {"x": "sampled answers", "panels": ("reward_model", "reward_auto", "response_length")}
# 几个算法相同的设置
SETTINGS = {"max_gen_len": 64, "log_interval": 1, "eval_interval": 0, "val_ratio": 0}


def before(bench: Bench) -> dict[str, float]:
    return dpo.spoken(bench, bench.open(bench.base, "full_sft"))


def write_prompts(bench: Bench, folder: Path) -> Path:
    """训练部分能套腔调的简单题，写成强化学习的提示：最后一轮是参考答案，判分信息在旁边。"""
    meta = json.loads((bench.world / "meta.json").read_text("utf-8"))
    tasks = Corpus(build_tasks(meta["seed"]), meta["scale"], meta["seed"]).easy_tasks()
    rng, rows = stream(meta["seed"], "style", TRAIN), []
    while len(rows) < PROMPTS:
        task = rng.choice(tasks)
        example = task.example(rng, TRAIN)
        if stylable(example):
            row = example.with_response(example.answer).conversation()
            rows.append({**row, "task": task.name, "grader": example.grader, "answer": example.answer})
            rows[-1] |= {
                name: list(getattr(example, name)) for name in ("accept", "reject") if getattr(example, name)
            }
    path = folder / "style_rl.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def train_reward_model(bench: Bench, seed: int, folder: Path) -> Any:
    """由偏好对训练一轮。"""
    options = bench.common(seed, folder, "dpo")
    return reward.run(reward.RewardModelArguments(**options, max_seq_len=256, eval_interval=0))


def run(
    bench: Bench, seed: int, arguments: type, train: Callable[[Any], Any], steps: int, **changes: Any
) -> Outcome:
    """训练奖励模型，再用它做强化学习，考一次；曲线的横轴是采样的条数。"""
    folder = bench.folder(seed)
    judge = train_reward_model(bench, seed, folder)
    options = bench.common(seed, folder, "rl") | SETTINGS | changes
    options |= {"data_path": str(write_prompts(bench, folder)), "val_path": None}
    options |= {
        "max_steps": bench.args.steps or steps,
        "epochs": 100,
        "reward_model_path": str(judge.weights),
    }
    result = train(arguments(**options))
    weight = result.weights.stem.rpartition("_")[0]
    metrics = dpo.spoken(bench, bench.open(folder, weight)) | {"accuracy": judge.metrics["val_accuracy"]}
    rows = [row for row in read_log(result.log) if "reward" in row]
    curves = {
        name: [[row["step"] * ROLLOUTS, round(row[name], 4)] for row in rows]
        for name in ("reward", "reward_model", "reward_auto", "kl", "entropy", "response_length")
        if name in rows[-1]
    }
    return Outcome(
        metrics, curves, notes={"settings": {**SETTINGS, **changes}, "reward_model": judge.metrics}
    )
