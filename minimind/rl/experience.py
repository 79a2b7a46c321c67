"""一步经验：提示 → 采样 → 打分 → 训练用的微批次；三个配方共用，各自只管优势与损失。"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minimind.dataset import RLAIFDataset, collate_rl
from minimind.objectives.policy import mean_and_std, moments, zero_spread
from minimind.rl.arguments import RLArguments
from minimind.rl.rewards import Rewards, make_samples
from minimind.rl.rollout import LocalRollout, Rollout, response_batch
from minimind.runtime.device import mix_seeds, stat_dtype
from minimind.runtime.distributed import all_reduce_sum, barrier, gather_objects, is_main_process, rank
from minimind.trainer.exhibits import extremes
from minimind.trainer.recipe import Batch, Run, Window


@dataclass
class Experience:
    """本进程这一步的 R 条回答，共 N 个回答词元。

    Args:
        rollout: 采样的结果，同一提示的相邻。
        prompts: ``[R]`` 各条的提示在训练集里的编号。
        scores: ``[R]`` fp32 总分。
        per_token: 名字 → ``[N]``，与回答词元一一对应（一条接一条），随微批次一起切开交给损失；
            ``old_logps`` 由 :func:`response_batch` 给，不在这里。
        pad_id: 陪跑的空批里的占位词元。
    """

    rollout: Rollout
    prompts: list[int]
    scores: Tensor
    pad_id: int
    per_token: dict[str, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """``[R]`` 各条回答的词元数，含结束符。"""
        return [len(response) for response in self.rollout.responses]

    @property
    def old_logps(self) -> Tensor:
        """``[N]`` 采样时的对数概率。"""
        return torch.cat([*self.rollout.logprobs, torch.zeros(0)])

    def spread(self, per_row: Tensor) -> Tensor:
        """``[R]`` → ``[N]``：每条一个的数铺到它的每个词元。"""
        return per_row.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))

    def select(self, rows: Sequence[int]) -> Experience:
        """只留 ``rows`` 这几条，不带 ``per_token``。"""
        fields = {name: [values[i] for i in rows] for name, values in vars(self.rollout).items()}
        prompts = [self.prompts[i] for i in rows]
        return Experience(type(self.rollout)(**fields), prompts, self.scores[list(rows)], self.pad_id)

    def micro_batches(self, rows: Sequence[int], size: int) -> Window:
        """``rows`` 这几条，每 ``size`` 条一个微批次；一条也没有就给一个陪跑的空批（编号为空）。

        长的和长的在一起，各微批次的大小才均匀；次序只由长度决定，各进程各算各的。
        """
        order = sorted(rows, key=lambda i: -len(self.rollout.responses[i]))
        chunks = [order[i : i + size] for i in range(0, len(order), size)] or [[]]
        return [(sorted({self.prompts[i] for i in chunk}), self.batch(chunk)) for chunk in chunks]

    def batch(self, rows: Sequence[int]) -> Batch:
        """这几条拼成一批，带着 ``per_token`` 里各自的一段与 ``lengths``。"""
        batch = response_batch(self.rollout, rows, self.pad_id)
        lengths = self.lengths
        for name, values in self.per_token.items():
            pieces = values.split(lengths) if lengths else []
            batch[name] = torch.cat([*(pieces[i] for i in rows), values.new_zeros(0)])
        return {**batch, "lengths": [lengths[i] for i in rows]}


class Collector:
    """采样并打分；``collect`` 每步调用一次。

    Args:
        policy: 从训练的模型里取出策略的函数；PPO 的模型里还有价值网络。
    """

    def __init__(
        self,
        args: RLArguments,
        tokenizer: Any,
        train_ds: RLAIFDataset,
        rewards: Rewards,
        policy: Callable[[nn.Module], nn.Module] = lambda model: model,
    ):
        self.args, self.tokenizer, self.train_ds, self.rewards, self.policy = (
            args,
            tokenizer,
            train_ds,
            rewards,
            policy,
        )
        self.sampler: Any = None

    def collect(self, run: Run, prompts: list[int]) -> Experience:
        """答这几个提示（训练集里的编号，可以一个也没有），打分，记下体征；每个进程都要调用。"""
        self.push_weights(run)
        seed = mix_seeds(self.args.seed, run.state.step, rank())
        experience, parts = self.sample(run, prompts, self.args.num_generations, seed)
        self._record(run, experience, parts)
        questions = [self.train_ds[i]["messages"][-1]["content"] or "" for i in experience.prompts]
        run.exhibits["rollouts"] = extremes(
            questions, experience.rollout.texts, experience.scores.tolist(), parts
        )
        return experience

    def push_weights(self, run: Run) -> None:
        """把此刻的策略交给远处的采样服务；在本进程里采样时什么也不做。每个进程都要调用。"""
        if self.args.rollout_url:
            model = self.policy(run.model)
            if is_main_process():
                self._sampler(run, model).push_weights(model)
            barrier()  # 权重送到之前谁也别采样

    def sample(
        self, run: Run, prompts: list[int], num_generations: int, seed: int
    ) -> tuple[Experience, dict[str, Tensor]]:
        """采样并打分，不记体征；另给出各条奖励各自的分数。"""
        items = [self.train_ds[i] for i in prompts]
        sampler = self._sampler(run, self.policy(run.model))
        rollout = sampler.generate([item["prompt_ids"].tolist() for item in items], num_generations, seed)
        scores, parts = score(self.rewards, rollout, items, bool(self.args.reasoning))
        rows = [prompts[g] for g in rollout.group]
        return Experience(rollout, rows, scores, self.tokenizer.pad_token_id), parts

    def _sampler(self, run: Run, model: nn.Module) -> Any:
        """头一次用到时才建：采样的精度与训练相同，而精度到训练开始时才定。"""
        args = self.args
        options = {"max_new_tokens": args.max_gen_len, "temperature": args.temperature}
        if self.sampler is None and args.rollout_url:
            from minimind.rl.remote import RemoteRollout

            self.sampler = RemoteRollout(
                args.rollout_url,
                self.tokenizer,
                kind=args.rollout_kind,
                weights_dir=args.rollout_weights_dir,
                api_key=os.environ.get("ROLLOUT_API_KEY"),  # 参数会记进日志，密钥不该在里面
                **options,
            )
        elif self.sampler is None:
            self.sampler = LocalRollout(
                model, self.tokenizer, max_slots=args.rollout_slots, dtype=run.dtype, **options
            )
        return self.sampler

    def _record(self, run: Run, experience: Experience, parts: dict[str, Tensor]) -> None:
        """奖励的平均与离散、全组同分的比例、长度、写不完的比例，以及各条奖励各自的平均。"""
        scores, n, group = experience.scores, len(experience.scores), self.args.num_generations
        totals = global_moments(scores, run)
        vitals = {
            "reward": (float(scores.sum()), n),
            "reward_std": (mean_and_std(totals)[1], 1),
            "response_length": (sum(experience.lengths), n),
            "truncated": (sum(experience.rollout.truncated), n),
        }
        if group > 1:
            flat = zero_spread(scores, group)
            vitals["zero_spread"] = (float(flat.sum()), len(flat))
        if len(parts) > 1:
            vitals |= {f"reward_{name}": (float(part.sum()), n) for name, part in parts.items()}
        run.record(**vitals)


def minibatches(rows: int, parts: int, seed: int) -> list[list[int]]:
    """打乱后分成 ``parts`` 份，大小至多差一；份数各进程相同，不够分的份是空的。"""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[k::parts] for k in range(parts)]


def prompts_of(window: Window) -> list[int]:
    """一窗提示微批次里的样本编号；凑数的批没有。"""
    return [i for ids, _ in window for i in ids]


def global_moments(values: Tensor, run: Run) -> Tensor:
    """各进程合起来的 :func:`moments`。"""
    return all_reduce_sum(moments(values).to(run.device, stat_dtype(run.device))).cpu()


def score(
    rewards: Rewards, rollout: Rollout, items: list[dict[str, Any]], reasoning: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """总分 ``[R]`` 与各条奖励的分数；开着思考时提示里已写了 ``<think>``，打分前补回去。"""
    texts = [f"<think>\n{text}" if reasoning else text for text in rollout.texts]
    result = rewards(make_samples(collate_rl(items), texts, rollout.group, rollout.truncated))
    return result.total, result.parts


def gather_lists(values: list[Any]) -> list[Any]:
    """各进程的列表按进程序号接起来，人人都拿到全部。"""
    return [value for part in gather_objects(values) for value in part]
