"""PPO、GRPO、SPO 共用：同样多的采样、同一份留出的多步题，训练前后各考一次：贪心一次，在训练的温度下采样一次。"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from bench_stages import Bench, Goal, Outcome

from minimind.evaluate.microworld import Answered, accuracy, evaluate_items, prompt_items
from minimind.inference.sampling import GREEDY, SamplingParams
from minimind.microworld import build_tasks
from minimind.microworld.core import HELDOUT
from minimind.microworld.stages import Corpus
from minimind.report.logs import read_log

# 每个算法都采样 60（--steps 可改）× 128 条；GRPO 是 16 题 × 8 条，另两个是 128 题 × 1 条
STEPS, ROLLOUTS = 60, 128
# 比较算法要分得清一两个点，而 240 题的卷子自己就有 3 个点的标准误：接着 rl_heldout.jsonl 往下出，去掉重复的约两千道
DRAWN, SAMPLES_EACH = 2800, 2
GOALS = [
    Goal("unsolved", "底座贪心答错的那些题，现在答对", at_least=0.20, change=True),
    Goal("solved", "多步题答对（留出，贪心）"),
    Goal("reward", "多步题得分（留出，按训练的温度采样）"),
    Goal("sampled", "采样的平均奖励（末五步）"),
    Goal("length", "回答长度（词元）", percent=False),
    Goal("truncated", "写不完的回答", at_most=0.02),
    Goal("others", "一步就够的简单题答对"),
]


def schedule(bench: Bench, generations: int) -> dict[str, int]:
    """走几步、几轮：采样的总数不超过预算，差也差不到一步。

    不能都走 60 步：一轮的最后一步不满，1,500 题每步 128 题时 60 步只有 7,500 条，预算是 7,680。
    """
    prompts = len((bench.world / "rl.jsonl").read_text("utf-8").splitlines())
    per_step = ROLLOUTS // generations
    rounds, rest = divmod((bench.args.steps or STEPS) * per_step, prompts)
    steps = rounds * math.ceil(prompts / per_step) + rest // per_step
    return {"max_steps": steps, "epochs": rounds + 1, "eval_interval": math.ceil(steps / 3)}


@cache
def heldout(bench: Bench) -> list[dict[str, Any]]:
    """留出的多步题：操作数没有在训练里出现过，问句各不相同。"""
    meta = json.loads((bench.world / "meta.json").read_text("utf-8"))
    corpus = Corpus(build_tasks(meta["seed"]), meta["scale"], meta["seed"])
    return list({one["conversations"][0]["content"]: one for one in corpus.rl(HELDOUT, DRAWN)}.values())


def problems(bench: Bench) -> list[dict[str, Any]]:
    """写成考题的样子。"""
    return prompt_items(heldout(bench))


def answer(loaded: Any, items: list[dict[str, Any]], params: SamplingParams = GREEDY) -> list[Answered]:
    return evaluate_items(
        loaded.model, loaded.tokenizer, items, max_new_tokens=64, description="多步题", params=params
    )


def open_exactly(bench: Bench, folder: Path, weight: str) -> Any:
    return bench.open(folder, weight, dtype="float32")


@cache
def base_answers(bench: Bench) -> list[Answered]:
    """底座的贪心回答。"""
    return answer(open_exactly(bench, bench.base, "full_sft"), problems(bench))


def exam(bench: Bench, folder: Path, weight: str) -> dict[str, float]:
    loaded = open_exactly(bench, folder, weight)
    results = base_answers(bench) if folder == bench.base else answer(loaded, problems(bench))
    missed = [now for now, base in zip(results, base_answers(bench)) if base.score < 1]
    sampling = SamplingParams(temperature=1.0, seed=1)
    sampled = answer(loaded, problems(bench) * SAMPLES_EACH, sampling)
    easy = evaluate_items(loaded.model, loaded.tokenizer, bench.items("easy"), description="简单题")
    return {
        "solved": accuracy(results),
        "reward": sum(one.score for one in sampled) / len(sampled),
        "unsolved": accuracy(missed),
        "truncated": sum(not one.finished for one in results) / len(results),
        "others": accuracy(easy),
    }


def before(bench: Bench) -> dict[str, float]:
    return exam(bench, bench.base, "full_sft")


def common(bench: Bench, seed: int, folder: Path, generations: int = 1) -> dict[str, Any]:
    """三个算法都一样的设置；其余用各自的默认值。"""
    val_path = folder / "rl_heldout.jsonl"
    val_path.write_text("".join(json.dumps(one) + "\n" for one in heldout(bench)), "utf-8")
    return {
        **bench.common(seed, folder, "rl"),
        "val_path": str(val_path),
        "val_max_rows": 0,
        **schedule(bench, generations),
        "max_gen_len": 64,
        "log_interval": 1,
    }


def outcome(bench: Bench, folder: Path, result: Any, vitals: tuple[str, ...]) -> Outcome:
    """考一次，曲线的横轴是已采样的条数。"""
    records = read_log(result.log)
    steps = [row for row in records if "reward" in row]
    each = (bench.args.steps or STEPS) * ROLLOUTS / steps[-1]["step"]  # 一轮的最后一步不满，均摊
    curves = {
        name: [[round(row["step"] * each), round(row[name], 4)] for row in steps]
        for name in ("reward", "response_length", "entropy", *vitals)
    }
    tested = [row for row in records if "val_reward" in row]
    curves["val_reward"] = [[round(row["step"] * each), round(row["val_reward"], 4)] for row in tested]
    metrics = exam(bench, folder, result.weights.stem.rpartition("_")[0])
    last = steps[-5:]
    metrics["sampled"] = sum(row["reward"] for row in last) / len(last)
    metrics["length"] = sum(row["response_length"] for row in last) / len(last)
    return Outcome(metrics, curves)


def train_and_examine(
    bench: Bench,
    seed: int,
    settings: Callable[[Bench, int, Path], Any],
    train: Callable,
    vitals: tuple[str, ...],
) -> Outcome:
    folder = bench.folder(seed)
    return outcome(bench, folder, train(settings(bench, seed, folder)), vitals)
