"""微世界的共同语言：题目、任务家族，以及训练与留出的划分。"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .mixing import SHARES, Share

TRAIN, HELDOUT = "train", "heldout"

# 题目按操作数划分时留出的比例：一成足够出题，又几乎不减少训练样本
HELDOUT_RATIO = 0.1


@dataclass(frozen=True)
class Example:
    """一道题：问句、回答、标准答案与判分办法。

    Args:
        key: 事实或操作数的标识，划分与去重都按它。
        question: 用户的话（最后一轮）。
        response: 助手的完整回答，一句话。
        answer: 判分用的标准答案，通常是 ``response`` 里的一段。
        grader: ``graders.py`` 里的判分器名字。
        accept: 除 ``answer`` 外也算对的写法。
        reject: 回答里出现就算错的词（同一关系的其他取值），防止“全都列出来”。
        steps: 多步题的推导，一句话；空表示一步就够。
        history: 之前的若干轮 ``{"role", "content"}``。
        system: 系统提示；``tools`` 是可用工具（公共格式的列表）。
        tool_calls: 非空时回答是调用工具，``response`` 为空。
        lines: 同一道题在预训练文本里的陈述写法，至少一种。
    """

    key: str
    question: str
    response: str
    answer: str
    grader: str = "contains"
    accept: tuple[str, ...] = ()
    reject: tuple[str, ...] = ()
    steps: str = ""
    history: tuple[dict, ...] = ()
    system: str = ""
    tools: tuple[dict, ...] = ()
    tool_calls: tuple[dict, ...] = ()
    lines: tuple[str, ...] = ()

    def prompt_messages(self) -> list[dict]:
        """到最后一轮用户发言为止的对话（公共格式，``tools`` 写在系统轮里）。"""
        messages: list[dict] = []
        if self.system or self.tools:
            turn: dict = {"role": "system", "content": self.system}
            if self.tools:
                turn["tools"] = json.dumps(list(self.tools), ensure_ascii=False)
            messages.append(turn)
        messages += [dict(turn) for turn in self.history]
        if self.question:
            messages.append({"role": "user", "content": self.question})
        return messages

    def reply(self) -> dict:
        """助手这一轮（公共格式）。"""
        turn: dict = {"role": "assistant", "content": self.response}
        if self.tool_calls:
            turn["tool_calls"] = json.dumps(list(self.tool_calls), ensure_ascii=False)
        return turn

    def conversation(self) -> dict:
        """一条 SFT 记录。"""
        return {"conversations": [*self.prompt_messages(), self.reply()]}

    def with_response(self, response: str) -> Example:
        return replace(self, response=response)


@dataclass
class Task:
    """一个任务家族；子类实现 :meth:`example`，其余有合用的默认。

    Args:
        name: 英文标识；``title`` 是中文名。
        level: ``easy`` 计入成绩单；``lora`` 换了身份才考；``hard`` 留给推理与强化学习，SFT 里只给少量样本。
        split: ``fact``（预训练陈述全部，SFT 只问一部分）、``operand``（操作数分开）或
            ``phrasing``（问法分开）。
    """

    name: str
    title: str
    level: str = "easy"
    split: str = "operand"
    seed: int = field(default=42, repr=False)

    @property
    def share(self) -> Share:
        """语料里的配比，见 mixing.py。"""
        return SHARES[self.name]

    def prepare(self) -> None:
        """种子定下之后的准备，例如建立子任务。"""

    def example(self, rng: random.Random, side: str) -> Example:
        """出一道属于 ``side`` 的题。"""
        raise NotImplementedError

    def document(self, rng: random.Random, side: str) -> str:
        """一段预训练文本。"""
        raise NotImplementedError

    def documents(self, rng: random.Random, side: str) -> Iterator[str]:
        """源源不断的预训练文本；需要均匀覆盖的家族在这里记住说到了哪里。"""
        while True:
            yield self.document(rng, side)

    def cloze(self, rng: random.Random, side: str) -> tuple[str, str, str] | None:
        """预训练的填空题：``(key, 前文, 续写)``；没有就返回 None。前文以标点收尾，免得切断词元。"""
        return None

    def side_of(self, key: str) -> str:
        return side_of(self.name, key, self.seed)


def side_of(task: str, key: str, seed: int, ratio: float = HELDOUT_RATIO) -> str:
    """按内容散列决定归属：与生成顺序、规模都无关，所以放大语料也不会串边。"""
    digest = hashlib.blake2b(f"{seed}|{task}|{key}".encode(), digest_size=8).digest()
    return HELDOUT if int.from_bytes(digest, "big") < ratio * 2**64 else TRAIN


def stream(seed: int, *names: str) -> random.Random:
    """以名字区分的独立随机流；字符串做种子走 SHA-512，不受散列随机化影响。"""
    return random.Random("/".join([str(seed), *names]))
