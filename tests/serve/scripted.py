"""让模型照着写：随机的小模型不会思考也不会调用工具，由引擎的干预钩子指定它写哪些词元。

只动抽样这一处；排队、计算、解析、流式、概率都是服务器真的那条路。
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from minimind.inference.reply import TAGS
from minimind.tokenizer import encode_plain
from minimind.tokenizer.loading import codec_of

SPLIT = re.compile(f"({'|'.join(TAGS)})")


@dataclass
class Script:
    """一条写定的回答。

    Args:
        text: 要写的话，标签写成字面。
        hold_at: 写到第几个词元前停住，等 :meth:`release`；``None`` 不停。
    """

    text: str
    hold_at: int | None = None
    written: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def ids(self, tokenizer) -> list[int]:
        controls = codec_of(tokenizer).controls
        pieces = [p for p in SPLIT.split(self.text) if p]
        ids = [[controls[p]] if p in controls else encode_plain(tokenizer, p) for p in pieces]
        return [*(token for piece in ids for token in piece), tokenizer.eos_token_id]

    def release(self) -> None:
        self.gate.set()


class ScriptHook:
    """:class:`minimind.inference.engine.LogitsHook`：只许写下一个写定的词元。"""

    def __init__(self, script: Script, ids: list[int]):
        self.script, self.ids = script, ids

    def adjust(self, logits: Tensor) -> None:
        at = self.script.written
        if at == self.script.hold_at:
            assert self.script.gate.wait(60), "没有人放行"
        logits.fill_(float("-inf"))
        logits[self.ids[min(at, len(self.ids) - 1)]] = 0.0

    def accept(self, token: int) -> bool:
        self.script.written += 1
        return False


@contextmanager
def scripted(server, *scripts: Script) -> Iterator[None]:
    """此间的请求依次照着 ``scripts`` 写；写定的用完之后照常。"""
    runner, waiting = server.runner, deque(scripts)
    submit, tokenizer = runner.submit, server.table.default.tokenizer

    def submit_scripted(request):
        if waiting:
            script = waiting.popleft()
            request = replace(request, hook=lambda: ScriptHook(script, script.ids(tokenizer)))
        return submit(request)

    runner.submit = submit_scripted
    try:
        yield
    finally:
        for script in scripts:
            script.release()
        del runner.submit
    assert not waiting, f"有 {len(waiting)} 条写定的回答没有用上"
