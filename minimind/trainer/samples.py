"""样例：每次验证时让模型贪心回答几个固定的提示，打印出来，也写进日志；强化学习另看采样里最好、居中、最差的各一条。

日志里单独一行，没有 ``loss``，写在验证的那一行之前::

    {"step": 400, "samples": [{"prompt": "你是谁？", "answer": "我是……"}],
     "rollouts": [{"kind": "best", "prompt": …, "answer": …, "reward": 1.5, "parts": {"auto": 1.0, …}}, …],
     "expert_load": [[各专家的份额], 每层一行], "tasks": {"add": 0.75}}

只看不改：随机数用完还原，权重与没有样例时逐位相同。多进程时只由主进程作答。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from minimind.console import say
from minimind.errors import UserError
from minimind.inference.prompts import CHAT_PROMPTS, PLAIN_PROMPTS
from minimind.model.model_minimind import MoE
from minimind.paths import file_problem, resolve_path
from minimind.runtime.device import preserved_rng
from minimind.runtime.distributed import barrier, is_main_process
from minimind.tokenizer import document_start, encode_chat_batch, encode_plain_batch
from minimind.trainer.exhibits import KINDS

MAX_NEW_TOKENS = 64  # 看得出会不会答、停不停得下来；再长验证就慢了
MAX_PROMPTS = 64
SHOWN = 160  # 终端里一句至多这么多字，日志里是全的
# 两道短而有定答的排在前面：默认的三个里就看得出学没学会
CHAT = tuple(dict.fromkeys(("你是谁？", "3 加 5 等于多少？", *CHAT_PROMPTS)))


def read_prompts(value: str | int, plain: bool) -> list[str]:
    """``--sample_prompts`` → 提示：个数取内置的前几个，否则是文本文件的路径，一行一个。

    Args:
        plain: 只会续写的（预训练）用一个开头，否则用问句。

    Raises:
        UserError: 比内置的还多；文件读不了、没有提示、太多。
    """
    builtin, text = PLAIN_PROMPTS if plain else CHAT, str(value)
    if is_count(value):
        if int(text) > len(builtin):
            raise UserError(
                f"值是 {text}",
                where="--sample_prompts",
                expected=f"0 到 {len(builtin)}，或一个文本文件（一行一个提示）",
                fix=f"改成 {len(builtin)}，或把要问的写进一个文件",
            )
        return list(builtin[: int(text)])
    path = resolve_path(text)
    if problem := file_problem(path, ".txt"):
        raise UserError(
            problem,
            where=f"--sample_prompts {text}",
            expected="个数，或一个文本文件（一行一个提示）",
            fix="写 3 用内置的三个，写 0 不要样例，或给出存在的文件",
        )
    try:
        # 只在换行处分行：提示里可以有 U+2028、U+0085，str.splitlines 会在那里切成两个
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError("不是 UTF-8", where=str(path), fix="把文件另存为 UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise UserError(
            f"有 {len(prompts)} 个提示",
            where=str(path),
            expected=f"1 到 {MAX_PROMPTS} 个，一行一个：每次验证都要全部答一遍",
            fix="增减文件里的行",
        )
    return prompts


def is_count(value: str | int) -> bool:
    """``--sample_prompts`` 写的是个数，不是文件。"""
    return str(value).isascii() and str(value).isdecimal()


def encode_prompts(tokenizer: Any, prompts: Sequence[str], plain: bool) -> list[list[int]]:
    """续写：``bos + 提示``；对话：套模板，末尾是助手回合的开头。"""
    if plain:
        return [[*document_start(tokenizer), *ids] for ids in encode_plain_batch(tokenizer, list(prompts))]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [chat.ids for chat in encode_chat_batch(tokenizer, turns, add_generation_prompt=True)]


class Sampler:
    """一次训练的样例：开始前备好提示，每次验证答一遍。

    Args:
        prompts: :func:`read_prompts` 的结果；空的就什么也不做。
        plain: 见 :func:`encode_prompts`。
        room: 模型的上下文，提示加回答要放得下。

    Raises:
        UserError: 有的提示太长。
    """

    def __init__(self, prompts: Sequence[str], tokenizer: Any, plain: bool, room: int):
        self.prompts, self.tokenizer = list(prompts), tokenizer
        self.ids = encode_prompts(tokenizer, prompts, plain) if prompts else []
        for prompt, ids in zip(self.prompts, self.ids):
            if len(ids) + MAX_NEW_TOKENS > room:
                raise UserError(
                    f"提示 {prompt[:30]!r} 有 {len(ids)} 个词元，加上回答放不进模型的上下文",
                    where="--sample_prompts",
                    expected=f"至多 {room - MAX_NEW_TOKENS} 个词元",
                    fix="换一个短的",
                )

    @classmethod
    def for_run(cls, wanted: str, recipe_name: str, config: Any, tokenizer: Any) -> Sampler:
        """按 ``--sample_prompts`` 备好。"""
        plain = recipe_name == "pretrain"
        prompts = read_prompts(wanted, plain)
        return cls(prompts, tokenizer, plain, getattr(config, "max_position_embeddings", 1 << 30))

    def answer(self, model: nn.Module) -> list[dict[str, str]]:
        """贪心回答各个提示，``{"prompt", "answer"}``，与提示同序。"""
        from minimind.inference.generate import generate_batch  # 引擎二十来个文件，不要样例的不必等
        from minimind.inference.loading import stop_ids

        answers = [""] * len(self.ids)
        for i, completion in generate_batch(
            model,
            self.ids,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_ids=stop_ids(model, self.tokenizer),
        ):
            answers[i] = self.tokenizer.decode(completion.ids, skip_special_tokens=True)
        return [{"prompt": prompt, "answer": answer} for prompt, answer in zip(self.prompts, answers)]

    def take(self, model: nn.Module, device: torch.device, shown: Mapping[str, Any]) -> dict[str, Any]:
        """这一次验证的样例，主进程之外与不要样例时是空的；每个进程都要调用。

        Args:
            shown: 配方自己给的几样（:data:`minimind.trainer.exhibits.EXHIBITS`）；给了 ``samples`` 就用它的前几个，不另答。
        """
        if not self.prompts:
            return {}
        found: dict[str, Any] = {}
        if is_main_process():
            if load := expert_load(model):  # 先取：作答会改写它
                found["expert_load"] = load
            found |= shown
            if "samples" in found:
                found["samples"] = found["samples"][: len(self.prompts)]
            else:
                training = model.training
                with preserved_rng(device):
                    model.eval()
                    found["samples"] = self.answer(model)
                    model.train(training)
        barrier()
        return found

    @staticmethod
    def show(found: Mapping[str, Any]) -> None:
        """打印样例。"""
        for one in found.get("samples", ()):
            say(f"样例｜{line(one['prompt'])} → {line(one['answer']) or '（什么也没写）'}")
        for one in found.get("rollouts", ()):
            parts = "，".join(f"{name} {value:g}" for name, value in one["parts"].items())
            say(
                f"采样·{KINDS[one['kind']]}｜{line(one['prompt'])} → {line(one['answer']) or '（什么也没写）'}"
                f"｜奖励 {one['reward']:g}（{parts}）"
            )


def expert_load(model: nn.Module) -> list[list[float]]:
    """各层混合专家最近一次前向（验证的最后一批）里，每个专家分到的份额；稠密模型是空的。"""
    loads = [module.last_load for module in model.modules() if isinstance(module, MoE)]
    return [[round(share, 4) for share in load.tolist()] for load in loads if load is not None]


def line(text: str) -> str:
    """放进终端的一行：换行写成 ↵，控制字符换成 �，太长的截断。"""
    text = "".join(c if c.isprintable() else "�" for c in text.replace("\n", "↵"))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
