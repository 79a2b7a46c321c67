"""带工具的强化学习：题 → 对话的开头，采样、打分、体征；:mod:`minimind.recipes.agent` 用它们。"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minimind.console import say
from minimind.dataset import RLAIFDataset, collate_rl
from minimind.inference.tool_loop import describe
from minimind.rl.conversations import (
    ANSWERED,
    OUT_OF_TURNS,
    ConversationRollout,
    EngineWriter,
    Opening,
    RemoteWriter,
    Tools,
    Trajectories,
    Trajectory,
)
from minimind.rl.experience import Collector, Experience
from minimind.rl.reward_agent import outcome
from minimind.rl.rewards import RewardResult, Rewards, make_samples
from minimind.runtime.device import mix_seeds
from minimind.runtime.distributed import is_main_process
from minimind.tokenizer import encode_chat
from minimind.trainer.exhibits import extremes
from minimind.trainer.recipe import Run


class ToolSource(Protocol):
    """一道题用哪些工具，例如 :class:`minimind.tools.toolset.Toolset`。"""

    def listed(self, record: dict[str, Any]) -> list[dict[str, Any]]: ...

    def for_record(self, record: dict[str, Any]) -> Tools: ...


def opening_of(item: dict[str, Any], tokenizer: Any, toolset: ToolSource, thinking: bool | None) -> Opening:
    """数据集的一项 → 对话的开头。"""
    record = item["record"]
    ids = encode_chat(tokenizer, item["messages"], toolset.listed(record), True, enable_thinking=thinking).ids
    return Opening(ids, toolset.for_record(record), thinking)


def grade(rewards: Rewards, rollout: Trajectories, items: list[dict[str, Any]]) -> RewardResult:
    """给各段对话打分；奖励看到的回答是最后一回合的正文，没写完的是空串。"""
    samples = make_samples(collate_rl(items), rollout.texts, rollout.group, rollout.truncated)
    for sample, one in zip(samples, rollout.conversations):
        sample.conversation = one
    return rewards(samples)


def outcomes(rollout: Trajectories, items: Sequence[dict[str, Any]]) -> list[float | None]:
    """``[R]``：各段的结果对了几成；无从判断的是 ``None``。"""
    return [outcome(items[one.group]["record"], one.answer) for one in rollout.conversations]


def vital_signs(rollout: Trajectories, items: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """``名字 → (和, 个数)``：答对的、每段几次调用、调用合乎说明的、结果是错误的、没写完的、几回合。"""
    talks, judged = rollout.conversations, [x for x in outcomes(rollout, items) if x is not None]
    made = sum(len(one.problems) for one in talks)
    return {
        "success": (float(sum(x >= 1 for x in judged)), len(judged)),
        "calls": (sum(len(one.calls) for one in talks), len(talks)),
        "valid_calls": (sum(problem is None for one in talks for problem in one.problems), made),
        "tool_errors": (sum(one.errors for one in talks), made),
        "unfinished": (sum(rollout.truncated), len(talks)),
        "out_of_turns": (sum(one.ending == OUT_OF_TURNS for one in talks), len(talks)),
        "turns": (sum(len(one.replies) for one in talks), len(talks)),
    }


def transcript(one: Trajectory) -> str:
    """给人看的一段：各回合的正文、调用与结果。"""
    lines, results = [], iter(one.results)
    for reply in one.replies:
        lines += [reply.text] if reply.text else []
        for call in reply.calls:
            lines += [f"[调用] {describe(call)}", f"[结果] {next(results, '（没有执行）')}"]
    if one.ending != ANSWERED:
        lines.append("（没写完）")
    elif not one.answer:  # 写出了结束符，正文却是空的（只想了想）
        lines.append("（什么也没答）")
    return "\n".join(lines)


class AgentCollector(Collector):
    """带工具的采样与打分。

    Args:
        args: :class:`minimind.recipes.agent.AgentArguments`。
    """

    def __init__(
        self, args: Any, tokenizer: Any, train_ds: RLAIFDataset, rewards: Rewards, toolset: ToolSource
    ):
        super().__init__(args, tokenizer, train_ds, rewards)
        self.toolset, self.items = toolset, []

    def collect(self, run: Run, prompts: list[int]) -> Experience:
        """见 :meth:`Collector.collect`；样例换成整段对话，``--debug_mode`` 时打印最好与最差的。"""
        experience = super().collect(run, prompts)
        talks = experience.rollout.conversations
        questions = [self.train_ds[i]["messages"][-1]["content"] or "" for i in experience.prompts]
        shown = extremes(questions, [transcript(one) for one in talks], experience.scores.tolist(), {})
        for mine, told in zip(shown, run.exhibits["rollouts"]):  # 次序只由分数决定，一一对应
            told["answer"] = mine["answer"]
        if self.args.debug_mode and is_main_process() and run.state.step % self.args.debug_interval == 0:
            order = experience.scores.argsort(stable=True).tolist()
            for row in dict.fromkeys([*order[-1:], *order[:1]]):
                text = self.tokenizer.decode(talks[row].ids, skip_special_tokens=False)
                say(
                    f"第 {run.state.step} 步，得分 {experience.scores[row]:.2f}，{talks[row].ending}：\n{text}"
                )
        return experience

    def sample(
        self, run: Run, prompts: list[int], num_generations: int, seed: int
    ) -> tuple[Experience, dict[str, Tensor]]:
        """采样并打分。"""
        self.items = [self.train_ds[i] for i in prompts]
        openings = [self._opening(item, mix_seeds(seed, g)) for g, item in enumerate(self.items)]
        rollout = conversations(self._writer(run), self.tokenizer, self.args).generate(
            openings, num_generations, seed
        )
        result = grade(self.rewards, rollout, self.items)
        rows = [prompts[g] for g in rollout.group]
        return Experience(rollout, rows, result.total, self.tokenizer.pad_token_id), result.parts

    def _opening(self, item: dict[str, Any], seed: int) -> Opening:
        """同一道题的各段都想，或都不想：组里才比得了。"""
        share = 1.0 if self.args.reasoning else self.args.thinking_ratio
        thinking = True if Random(seed).random() < share else None
        return opening_of(item, self.tokenizer, self.toolset, thinking)

    def _writer(self, run: Run) -> Any:
        if self.args.rollout_url:
            return RemoteWriter(self._sampler(run, self.policy(run.model)))
        if self.sampler is None:
            self.sampler = engine_writer(
                self.policy(run.model), self.tokenizer, self.args, self.args.temperature, run.dtype
            )
        return self.sampler

    def _record(self, run: Run, experience: Experience, parts: dict[str, Tensor]) -> None:
        super()._record(run, experience, parts)
        signs = vital_signs(experience.rollout, self.items)
        run.record(**{name: value for name, value in signs.items() if value[1]})


def engine_writer(
    model: nn.Module, tokenizer: Any, args: Any, temperature: float, dtype: torch.dtype | None = None
) -> EngineWriter:
    """在本进程里写。"""
    return EngineWriter(
        model,
        tokenizer,
        max_slots=args.rollout_slots,
        room=args.max_total_len,
        temperature=temperature,
        dtype=dtype,
    )


def conversations(writer: Any, tokenizer: Any, args: Any) -> ConversationRollout:
    """按参数的各个上限采样。"""
    return ConversationRollout(
        writer,
        tokenizer,
        max_new_tokens=args.max_gen_len,
        max_total_len=args.max_total_len,
        max_turns=args.max_turns,
    )


def greedy(
    model: nn.Module, tokenizer: Any, items: list[dict[str, Any]], toolset: ToolSource, args: Any
) -> Trajectories:
    """贪心地走一遍这些题，各一段。"""
    thinking = True if args.reasoning else None
    openings = [opening_of(item, tokenizer, toolset, thinking) for item in items]
    return conversations(engine_writer(model, tokenizer, args, 0.0), tokenizer, args).generate(openings, 1, 0)


def examined(rollout: Trajectories, items: list[dict[str, Any]], rewards: Rewards) -> dict[str, Any]:
    """留出题上的一遍 → 验证的各项：平均得分与体征（``val_`` 开头），样例是整段对话。"""
    signs = {f"val_{name}": total / n for name, (total, n) in vital_signs(rollout, items).items() if n}
    asked = [item["messages"][-1]["content"] or "" for item in items]
    told = [transcript(one) for one in rollout.conversations]
    return {
        "samples": [{"prompt": prompt, "answer": answer} for prompt, answer in zip(asked, told)],
        "val_reward": float(grade(rewards, rollout, items).total.mean()),
        **signs,
    }
