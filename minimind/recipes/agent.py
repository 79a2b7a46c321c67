"""带工具的强化学习：自己调用工具、看结果、再调用，直到作答；只看最后答得对不对。

一段对话是提示，然后几回合：模型写的 y，工具的结果 o，再写……每个提示走 G 段，第 i 段得分 r_i，优势与 GRPO 相同，
同一段里模型写的每个词元共用::

    A_i = (r_i − 组平均) / (组标准差 + 1e-4)
    L   = − (1/N) Σ_i Σ_{t 是模型写的} sg(min(ρ_t, ε_high))·A_i·log π(y_t)  +  β·k3      （cispo，默认）

N 是这一步模型写的词元数：工具的结果只是上文，不进损失、KL 与词元数。一次采样只更新一次，所以 ρ = 1，各种截断这时都一样。
整批对话在引擎里一起走，每段的 KV 留到下一回合（:mod:`minimind.rl.conversations`）；分数见 :mod:`minimind.rl.reward_agent`。

来源：Shao et al. 2024（GRPO，arXiv 2402.03300）；MiniMax-M1（CISPO，arXiv 2506.13585）。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from minimind.arguments import arg, override
from minimind.console import say
from minimind.dataset import RLAIFDataset
from minimind.errors import UserError
from minimind.model_arguments import ON_OFF
from minimind.objectives.policy import group_advantages
from minimind.recipes.entry import entry, open_datasets, open_model
from minimind.recipes.grpo import GRPOArguments, learnable_rows
from minimind.recipes.health import AgentHealth
from minimind.recipes.rl import correct_by_task, no_batch
from minimind.rl.agent import AgentCollector, examined, greedy, outcomes
from minimind.rl.experience import global_moments, prompts_of
from minimind.rl.policy import frozen_copy, policy_loss, response_logps
from minimind.rl.reward_agent import check_expected
from minimind.rl.rewards import Rewards, build_rewards
from minimind.runtime.distributed import is_main_process
from minimind.tools.toolset import Toolset
from minimind.trainer.loader import epoch_order
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import Data, Recipe, Run, Window
from minimind.trainer.reference import StartingPoint
from minimind.trainer.samples import is_count
from minimind.trainer.train_args import MAX_LENGTH


@dataclass
class AgentArguments(GRPOArguments, group="工具与多轮"):
    """带工具的强化学习：几回合的对话，只看最后答得对不对。"""

    max_turns: int = arg(3, "一段对话里模型最多写几回合（一回合可以有几次调用）", low=1, high=64)
    max_total_len: int = arg(2500, "一段对话（提示、各回合、各次结果）全长的上限", low=2, high=MAX_LENGTH)
    thinking_ratio: float = arg(0.0, "多大比例的提示开着思考（--reasoning 1 是全部）", low=0, high=1)
    tools: str | None = arg(
        None, "自己的工具：一个 .py 文件，每个带类型标注与说明的函数是一个工具", text="path", resume="content"
    )
    tool_timeout: float = arg(10.0, "自己的工具一次最多几秒，超过了就是一句错误", above=0, high=3600)
    debug_mode: int = arg(0, "打印最好与最差的整段对话，连同控制标记", ON_OFF, resume="harmless")
    debug_interval: int = arg(20, "每几步打印一次", low=1, high=10**9, resume="harmless")

    loss_type: str = override(GRPOArguments, "loss_type", "cispo")
    reward: str | None = override(
        GRPOArguments,
        "reward",
        "agent",
        help="奖励，例如 agent、agent:1,length:0.1、文件.py:函数；给了 --reward_model_path 再加它",
    )
    save_weight: str = override(GRPOArguments, "save_weight", "agent")
    reasoning: int = override(
        GRPOArguments, "reasoning", 0, help="是否先想再答（1：从 reason 权重开始，每个提示都开着思考）"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reasoning and self.thinking_ratio not in (0, 1):
            raise UserError(
                f"值是 {self.thinking_ratio:g}，而 --reasoning 1 是每个提示都开着思考",
                where="--thinking_ratio",
                fix="去掉其中一个",
            )
        if self.tools is None and self.tool_timeout != type(self).tool_timeout:
            raise UserError(
                f"值是 {self.tool_timeout:g}，只管 --tools 里自己的工具",
                where="--tool_timeout",
                fix="去掉它，或给出 --tools 文件.py",
            )
        if self.max_total_len <= self.max_seq_len:
            raise UserError(
                f"不比提示的上限 --max_seq_len {self.max_seq_len} 大",
                where=f"--max_total_len {self.max_total_len}",
                expected="提示之外还放得下几回合",
                fix="加大它，或减小 --max_seq_len",
            )


def run(args: AgentArguments) -> TrainResult:
    """按参数训练一次；返回权重位置与最后的指标。"""
    model, tokenizer = open_model(args)
    start = {"start": StartingPoint(args, model)} if args.beta else {}
    data = open_datasets(RLAIFDataset, args, tokenizer, "agent")
    toolset = Toolset(args.tools, args.tool_timeout)
    toolset.check(data.train, data.val)
    toolset.check_room(tokenizer, args.max_seq_len, args.max_total_len)
    rewards = build_rewards(
        args.reward,
        reward_model_path=args.reward_model_path,
        device=model.device,
        data_path=data.train.cache.source,
        trust_remote_code=bool(args.trust_remote_code),
    )
    if "agent" in rewards.weights:
        check_expected(data.train, data.val)
    say(rewards.describe())
    collector = AgentCollector(args, tokenizer, data.train, rewards, toolset)
    reference = frozen_copy(model) if args.beta else None
    loss, count = policy_loss(args, args.loss_type)

    def prepare(run: Run, window: Window) -> Iterator[Window]:
        experience = collector.collect(run, prompts_of(window))
        totals = global_moments(experience.scores, run)
        advantages = group_advantages(experience.scores, args.num_generations, args.scale_rewards, totals)
        experience.per_token["advantages"] = experience.spread(advantages)
        if reference is not None:
            experience.per_token["ref_logps"] = response_logps(reference, experience, run, args)
        rows = learnable_rows(experience, args)
        run.record(kept=(len(rows), len(experience.scores)))
        yield experience.micro_batches(rows, args.rows_per_forward)

    recipe = Recipe(
        "agent",
        loss,
        no_batch,
        count,
        prepare,
        health=AgentHealth(args.max_gen_len),
        on_eval=held_out(args, data.val, rewards, toolset, tokenizer, model),
        identity={"奖励": rewards.identity, "工具": toolset.identity},
        extra_state=start,
    )
    return train(args, recipe, model, tokenizer, Data(data.train))


def held_out(
    args: AgentArguments, val_ds: Any, rewards: Rewards, toolset: Toolset, tokenizer: Any, model: nn.Module
) -> Callable[[nn.Module, int], dict[str, Any]] | None:
    """``on_eval``：贪心地走一遍留出的题；训练前先考一次，说出起点。没有留出题时为 ``None``。"""
    if val_ds is None:
        return None
    chosen = epoch_order(len(val_ds), args.seed, 0)[: args.val_max_rows or len(val_ds)]
    items = [val_ds[int(i)] for i in chosen]

    def answer(model: nn.Module, step: int) -> dict[str, Any]:
        rollout = greedy(model, tokenizer, items, toolset, args)
        right = [x or 0.0 for x in outcomes(rollout, items)]
        found = {**examined(rollout, items, rewards), "tasks": correct_by_task(items, right)}
        if not is_count(args.sample_prompts):  # 使用者另给了一个文件的，答他的
            del found["samples"]
        return found

    if is_main_process() and not args.from_resume:
        now = answer(model, 0)
        right = f"答对 {now['val_success']:.1%}，" if "val_success" in now else ""
        say(f"训练前：留出的 {len(items)} 题，{right}平均得分 {now['val_reward']:.3f}。")
    return answer


main = entry(AgentArguments, run)
