"""数据测试里反复用到的小构造。"""

from __future__ import annotations


def chat(*contents: str, system: str | None = None) -> dict:
    """交替的 user / assistant 对话。"""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return {"conversations": turns}
