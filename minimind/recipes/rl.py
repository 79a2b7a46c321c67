"""强化学习三个配方共同的部分：开头的模型、提示与奖励，留出题上的得分，训练循环的共同设置。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from minimind.console import say
from minimind.dataset import RLAIFDataset
from minimind.model import MiniMindLM
from minimind.recipes.entry import open_datasets, open_model
from minimind.recipes.health import RLHealth
from minimind.rl.arguments import RLArguments
from minimind.rl.experience import score
from minimind.rl.rewards import Rewards, build_rewards
from minimind.rl.rollout import LocalRollout
from minimind.runtime.distributed import is_main_process
from minimind.trainer.loader import epoch_order
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import Data, Recipe
from minimind.trainer.reference import StartingPoint
from minimind.trainer.samples import Sampler, is_count


@dataclass
class Stage:
    """开场备好的东西；``val_ds`` 是留出的提示，可能没有。"""

    model: MiniMindLM
    tokenizer: Any
    train_ds: RLAIFDataset
    val_ds: RLAIFDataset | None
    rewards: Rewards
    extra_state: dict[str, Any] = field(default_factory=dict)


def open_stage(args: RLArguments, kl: float) -> Stage:
    """按参数打开模型、提示与奖励，说清奖励由什么组成。

    Args:
        kl: 与参考模型的 KL 的系数；不为 0 时起点的权重要随续训存档走，参考模型由它复制。
    """
    model, tokenizer = open_model(args)
    extra_state = {"start": StartingPoint(args, model)} if kl else {}
    thinking = {"enable_thinking": True} if args.reasoning else {}
    data = open_datasets(RLAIFDataset, args, tokenizer, **thinking)
    rewards = build_rewards(
        args.reward,
        reward_model_path=args.reward_model_path,
        reasoning=args.reasoning,
        device=model.device,
        data_path=data.train.cache.source,
        trust_remote_code=bool(args.trust_remote_code),
        tokenizer_path=args.tokenizer_path,
    )
    say(rewards.describe())
    if warning := data.train.reference_warning():
        say(f"留意：{data.train.cache.name} 里 {warning}。")
    return Stage(model, tokenizer, data.train, data.val, rewards, extra_state)


def no_batch(items: list[Any]) -> dict[str, Any]:
    """提示不拼批：采样只要它们的编号。"""
    return {}


def train_stage(
    args: RLArguments,
    stage: Stage,
    recipe: Recipe,
    *,
    model: nn.Module | None = None,
    policy: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> TrainResult:
    """训练到头：提示当数据，看体征，按间隔考留出题。

    Args:
        recipe: 配方各自的部分，至少有 ``count`` 与 ``prepare``；三个配方相同的由这里补上。
        model: 训练的模型，默认就是策略。
        policy: 从训练的模型里取出策略。
    """
    recipe = replace(
        recipe,
        on_eval=held_out_score(args, stage, policy),
        health=RLHealth(args.max_gen_len),
        identity={"奖励": stage.rewards.identity},
        extra_state={**stage.extra_state, **recipe.extra_state},
    )
    return train(args, recipe, model or stage.model, stage.tokenizer, Data(stage.train_ds))


def held_out_score(
    args: RLArguments, stage: Stage, policy: Callable[[nn.Module], nn.Module]
) -> Callable[[nn.Module, int], dict[str, Any]] | None:
    """``on_eval``：贪心回答留出的题，报平均得分、写不完的比例与长度，附样例与各任务答对的比例；没有留出题时为 None。

    训练前先考一次，说出起点。

    Args:
        policy: 从训练的模型里取出策略。
    """
    if stage.val_ds is None:
        return None
    chosen = epoch_order(len(stage.val_ds), args.seed, 0)[: args.val_max_rows or len(stage.val_ds)]
    items = [stage.val_ds[int(i)] for i in chosen]
    own = None  # 样例就用留出的题；使用者另给了一个文件的，答他的
    if not is_count(args.sample_prompts):
        own = Sampler.for_run(args.sample_prompts, "rl", stage.model.config, stage.tokenizer)

    def answer(model: nn.Module) -> dict[str, Any]:
        sampler = LocalRollout(model, stage.tokenizer, max_new_tokens=args.max_gen_len, temperature=0.0)
        rollout = sampler.generate([item["prompt_ids"].tolist() for item in items], 1, 0)
        scores, parts = score(stage.rewards, rollout, items, bool(args.reasoning))
        prompts = [item["messages"][-1]["content"] or "" for item in items]
        shown = [{"prompt": prompt, "answer": text} for prompt, text in zip(prompts, rollout.texts)]
        return {
            "samples": shown if own is None else own.answer(model),
            "tasks": correct_by_task(items, parts.get("auto", scores).tolist()),
            "val_reward": float(scores.mean()),
            "val_truncated": sum(rollout.truncated) / len(rollout),
            "val_length": sum(map(len, rollout.responses)) / len(rollout),
        }

    if is_main_process() and not args.from_resume:
        reward = answer(stage.model)["val_reward"]
        say(f"训练前：留出的 {len(items)} 题贪心作答，平均得分 {reward:.3f}。")
    return lambda model, step: answer(policy(model))


def correct_by_task(items: Sequence[dict[str, Any]], scores: Sequence[float]) -> dict[str, float]:
    """各任务得满分（1 分）的比例；题里没写任务的不算。"""
    groups: dict[str, list[bool]] = {}
    for item, got in zip(items, scores):
        if isinstance(task := item["record"].get("task"), str):
            groups.setdefault(task, []).append(got >= 1)
    return {task: sum(right) / len(right) for task, right in groups.items()}
