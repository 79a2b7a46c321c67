"""奖励：一张登记表，按 ``--reward`` 的写法加权组合；强化学习的三个配方都从这里拿分数。

::

    --reward auto                          可验证的规则（默认）：判分器、数值或逐字相同
    --reward exact:1,format:0.5            登记表里的几条，冒号后是权重
    --reward "auto,length(1-200):0.2"      有的规则带参数
    --reward path/to/file.py:function:0.3  自己的函数 f(prompt, response, reference) -> float
    --reward_model_path 文件或目录         奖励模型，见 :mod:`minimind.rl.reward_model`

总分 R_i = Σ_k w_k · f_k(样本 i)。哪一条对哪个样本抛异常、或给出的不是有限的数，就报错并指出是哪个样本：
悄悄记 0 分会让模型朝着“让打分出错”去学，而曲线上看不出来。
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind.dataset.jsonl import short
from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.rl import reward_agent
from minimind.rl import reward_rules as rules
from minimind.rl.reward_file import RewardFunctionError, load_function
from minimind.rl.reward_rules import Sample
from minimind.runtime.files import content_hash


def make_samples(
    batch: dict[str, Any], texts: Sequence[str], group: Sequence[int], truncated: Sequence[bool]
) -> list[Sample]:
    """把采样的结果与 :func:`minimind.dataset.collate.collate_rl` 的一批对上。

    Args:
        batch: 提示的一批，用到 ``messages``、``references``、``records``、``lines``，有的话还有 ``sources``。
        texts, group, truncated: 各回答的文字、属于第几个提示、有没有写完，长度都是 R。
    """
    return [
        Sample(
            batch["messages"][g],
            batch["messages"][g][-1].get("content") or "",
            text,
            batch["references"][g],
            batch["records"][g],
            batch["lines"][g],
            bool(cut),
            batch["sources"][g] if "sources" in batch else "",
        )
        for text, g, cut in zip(texts, group, truncated, strict=True)
    ]


@dataclass(frozen=True)
class Rule:
    """登记表里的一条：一次给一批样本打分。

    Args:
        score: ``list[Sample] -> 分数的序列``。
        low, high: 分数的范围，SPO 用它把总分换到 [0, 1]；用户的函数不知道，为 None。
        each: 为真时 ``score`` 一次只收一个样本；为假时收整批（奖励模型）。
        identity: 名字之外还由什么决定：参数，或文件内容的指纹。
    """

    score: Callable[..., Any]
    low: float | None
    high: float | None
    each: bool = True
    identity: str = ""


# 名字 → 规则；自己的项目里可以直接往里加
REWARDS: dict[str, Rule] = {
    "auto": Rule(rules.auto, 0, 1),
    "exact": Rule(rules.exact, 0, 1),
    "numeric": Rule(rules.numeric, 0, 1),
    "microworld": Rule(rules.microworld, 0, 1),
    "format": Rule(rules.format_tags, 0, 1.5),
    "length": Rule(rules.length, -1, 0),
    "repetition": Rule(rules.repetition, -1, 0),
    "agent": Rule(reward_agent.agent, reward_agent.LOWEST, 1),
}
MODEL_CLIP = 3.0  # 奖励模型的分数截到 ±3：个别样本的极端分数会左右整组的优势
# 默认的组合：对错为主；带思考时格式最多占 0.75，少于答对的 1，不会出现“格式对就够了”
DEFAULT_SPEC, DEFAULT_REASONING_SPEC = "auto:1", "auto:1,format:0.5"
MODEL_REASONING_SPEC = "model:1,format:0.5"


@dataclass
class RewardResult:
    """一批分数：``total`` float32 ``[R]``；``parts`` 各条未加权的分数 ``{名字: [R]}``。"""

    total: Tensor
    parts: dict[str, Tensor]


class Rewards:
    """加权组合；``rewards(samples)`` 打分。由 :func:`build_rewards` 建立。

    Attributes:
        weights: ``{名字: 权重}``。
        bounds: 总分的 ``(最低, 最高)``；有一条不知道范围时为 None。
        identity: 各条、权重与所用文件的内容；续训据此核对。
    """

    def __init__(self, rules: dict[str, tuple[Rule, float]], data_path: str | Path | None = None):
        self.rules, self.data_path = rules, data_path
        self.weights = {name: weight for name, (_, weight) in rules.items()}
        self.bounds = self._bounds()
        self.identity = "，".join(
            f"{name}{rule.identity} × {weight:g}" for name, (rule, weight) in rules.items()
        )

    def _bounds(self) -> tuple[float, float] | None:
        if any(rule.low is None for rule, _ in self.rules.values()):
            return None
        ends = [sorted((weight * rule.low, weight * rule.high)) for rule, weight in self.rules.values()]
        return sum(low for low, _ in ends), sum(high for _, high in ends)

    def __call__(self, samples: Sequence[Sample]) -> RewardResult:
        """给一批回答打分。

        Raises:
            UserError: 某一条抛了异常，或给出的不是有限的数；说出样本在数据文件的第几行、提示与回答的开头。
        """
        parts = {name: self._scores(name, rule, samples) for name, (rule, _) in self.rules.items()}
        total = torch.zeros(len(samples))
        for name, scores in parts.items():
            total += self.weights[name] * scores
        return RewardResult(total, parts)

    def _scores(self, name: str, rule: Rule, samples: Sequence[Sample]) -> Tensor:
        if rule.each:
            values = []
            for sample in samples:
                try:
                    value = rule.score(sample)
                except Exception as error:  # 用户的函数什么都可能抛；换成指出样本的一句话，不吞掉
                    raise self._failed(name, sample, error) from error
                values.append(self._number(name, sample, value))
        else:
            values = [self._number(name, s, v) for s, v in zip(samples, rule.score(samples), strict=True)]
        return torch.tensor(values, dtype=torch.float32)

    def _number(self, name: str, sample: Sample, value: Any) -> float:
        """分数必须是一个有限的数。"""
        if isinstance(value, (Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
            value = value.item()
        if not isinstance(value, numbers.Real):
            fix = "函数的末尾可能忘了 return" if value is None else "让它返回一个 float"
            raise self._about(f"奖励 {name} 返回 {short(repr(value))}", sample, fix)
        if not math.isfinite(value):
            raise self._about(
                f"奖励 {name} 返回 {value}", sample, "检查除以 0、取对数、空列表求平均之类的地方"
            )
        return float(value)

    def _failed(self, name: str, sample: Sample, error: Exception) -> UserError:
        at = f"（{error.where}）" if isinstance(error, RewardFunctionError) else ""
        cause = error.__cause__ if isinstance(error, RewardFunctionError) else error
        message = str(cause).splitlines()[0] if str(cause) else ""
        what = f"奖励 {name} 在这个样本上出错{at}：{type(cause).__name__} {message}".rstrip()
        return self._about(what, sample, "改这条数据，或改奖励函数 / 换一条 --reward")

    def _about(self, what: str, sample: Sample, fix: str) -> UserError:
        file = sample.source or self.data_path
        where = f"{file or '数据'}:{sample.line}" if sample.line else str(file or "奖励")
        seen = f"；提示 {short(sample.prompt, 60)}，回答 {short(sample.response, 80)}"
        return UserError(what + seen, where=where, expected="对每个样本给出一个有限的数", fix=fix)

    def describe(self) -> str:
        """一句话：由哪几条、各多少权重组成。"""
        return "奖励：" + " + ".join(f"{name} × {weight:g}" for name, weight in self.weights.items())


def build_rewards(
    spec: str | None = None,
    *,
    reward_model_path: str | None = None,
    reasoning: int = 0,
    device: torch.device | str = "cpu",
    data_path: str | Path | None = None,
    trust_remote_code: bool = False,
    tokenizer_path: str | None = None,
) -> Rewards:
    """由命令行的写法建立奖励。

    Args:
        spec: ``--reward``；``None`` 时没有奖励模型用可验证的规则，有则用奖励模型；``reasoning`` 再加格式分。
        reward_model_path: ``--reward_model_path``；给了而 ``spec`` 里没写 ``model`` 时按权重 1 加进去。
        reasoning: 为 1 时回答应带 ``<think>`` 与 ``<answer>``；奖励模型按 0.4 整体 + 0.6 答案算分。
        device: 奖励模型放在哪里。
        data_path: 数据文件，报错时指出第几行。
        trust_remote_code: 允许执行奖励模型目录里自带的代码。
        tokenizer_path: 训练的分词器；自己训练的奖励模型要用同一个。

    Raises:
        UserError: 写法不对、没有这条奖励、文件或函数不对、奖励模型不是奖励模型。
    """
    if not spec:
        if reward_model_path:
            spec = MODEL_REASONING_SPEC if reasoning else "model:1"
        else:
            spec = DEFAULT_REASONING_SPEC if reasoning else DEFAULT_SPEC
    chosen: dict[str, tuple[Rule, float]] = {}
    for item in split_spec(spec):
        name, rule, weight = parse_item(item)
        if name in chosen:
            raise UserError(f"{name} 写了两次", where=f"--reward {spec}", fix="合成一项，权重相加")
        chosen[name] = (rule, weight)
    if reward_model_path and "model" not in chosen:
        chosen["model"] = (_MODEL_PLACEHOLDER, 1.0)
    if "model" in chosen:
        if not reward_model_path:
            raise UserError(
                "用到奖励模型 model，却没有说它在哪里", where="--reward", fix="加 --reward_model_path 目录"
            )
        from minimind.rl.reward_model import load_reward_model

        model = load_reward_model(
            reward_model_path,
            device,
            trust_remote_code=trust_remote_code,
            reasoning=bool(reasoning),
            clip=MODEL_CLIP,
            tokenizer_path=tokenizer_path,
        )
        identity = f"（{content_hash(resolve_path(reward_model_path))}）"
        chosen["model"] = (Rule(model, -MODEL_CLIP, MODEL_CLIP, False, identity), chosen["model"][1])
    return Rewards(chosen, data_path)


_MODEL_PLACEHOLDER = Rule(lambda _: (), -MODEL_CLIP, MODEL_CLIP, each=False)
_FILE_ITEM = re.compile(r"(?P<file>.+\.py):(?P<function>[^:]+)(?::(?P<weight>[^:]+))?")
_RULE_ITEM = re.compile(r"(?P<name>\w+)(?:\((?P<range>[^)]*)\))?(?::(?P<weight>[^:]+))?")


def split_spec(spec: str) -> list[str]:
    """按逗号切开，空项报错。"""
    items = [item.strip() for item in spec.split(",")]
    if not all(items):
        raise UserError(
            "有一项是空的", where=f"--reward {spec}", expected="形如 auto:1,format:0.5", fix="去掉多余的逗号"
        )
    return items


def parse_item(item: str) -> tuple[str, Rule, float]:
    """``exact:0.5``、``length(10-200):0.1``、``my.py:score:2`` → ``(名字, 规则, 权重)``。"""
    where = f"--reward {item}"
    if match := _FILE_ITEM.fullmatch(item):
        function = load_function(match["file"], match["function"])
        identity = f"（{content_hash(resolve_path(match['file']))}）"
        return match["function"], Rule(function, None, None, True, identity), _weight(match["weight"], where)
    match = _RULE_ITEM.fullmatch(item)
    if match is None or match["name"] not in (*REWARDS, "model"):
        raise UserError(
            f"没有这条奖励 {item!r}",
            where="--reward",
            expected=f"{'、'.join((*REWARDS, 'model'))}，或 文件.py:函数名，后面可跟 :权重",
            fix="例如 --reward auto:1,format:0.5 或 --reward my_reward.py:score",
        )
    name, weight = match["name"], _weight(match["weight"], where)
    if name == "model":
        return name, _MODEL_PLACEHOLDER, weight
    rule = REWARDS[name]
    if match["range"] is not None:
        score = _with_range(name, rule, match["range"], where)
        rule = Rule(score, rule.low, rule.high, True, f"({match['range']})")
    return name, rule, weight


def _weight(text: str | None, where: str) -> float:
    try:
        weight = float(text or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"权重是 {text!r}", where=where, expected="一个数，例如 auto:1 或 length:0.1")
    return weight


def _with_range(name: str, rule: Rule, text: str, where: str) -> Callable[[Sample], float]:
    """括号里的参数：目前只有 ``length(最少-最多)``。"""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if name != "length" or match is None or not int(match[1]) <= int(match[2]) > 0:
        raise UserError(
            f"参数 ({text}) 不对", where=where, expected="只有 length 带参数，写成 length(最少字数-最多字数)"
        )
    return partial(rule.score, low=int(match[1]), high=int(match[2]))
