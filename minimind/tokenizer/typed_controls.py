"""文字里写着控制 token 的字样（用户打了 ``<|im_end|>``）：别人的模板只认文字，分不清哪个是结构。

所以渲染前给这些字做上记号，渲染后把结构里的换成谁也猜不到的名字，拿掉记号，再用同一个分词器、改了名的控制 token 分词：
用户写的那些就只是普通字符。
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from minimind.errors import UserError
from minimind.tokenizer.loading import codec_of
from minimind.tokenizer.special import REPLY_TAGS


def _spec(tokenizer) -> dict[str, Any]:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec.update(post_processor=None, truncation=None, padding=None)
    return spec


def whole_backend(tokenizer) -> Tokenizer:
    """整段分词，控制 token 照认；与 ``tokenizer(text, add_special_tokens=False)`` 相同，不受别处设的补齐影响。"""
    codec = codec_of(tokenizer)
    if codec.whole is None:
        codec.whole = Tokenizer.from_str(json.dumps(_spec(tokenizer), ensure_ascii=False))
    return codec.whole


def renamed_backend(tokenizer, guard: TypedControls) -> tuple[Tokenizer, dict[str, str]]:
    """:func:`_build_renamed`，做好一次就记住。

    Raises:
        UserError: 这种分词器改不了名。
    """
    codec = codec_of(tokenizer)
    if codec.renamed is None:
        try:
            codec.renamed = _build_renamed(_spec(tokenizer))
        except Exception as error:  # tokenizers 以裸 Exception 报格式错误
            raise UserError(
                f"文字里有控制 token 的字样 {guard.example}，这个分词器没法把它当普通文字",
                where="消息",
                fix="去掉这样的字样",
            ) from error
    return codec.renamed


def _build_renamed(spec: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """同一个分词器，控制 token 改了名；名字里有随机数，正文里不会有。

    Returns:
        ``(tokenizer, names)``，``names`` 是原名 → 新名。

    Raises:
        ValueError: 有 token 的 id 变了。
    """
    added, model = spec["added_tokens"], spec["model"]
    secret = secrets.token_hex(8)
    names = {token["content"]: f"\U000f0000{secret}.{token['id']}\U000f0001" for token in added}
    if isinstance(model["vocab"], dict):
        vocab = {names.get(word, word): i for word, i in model["vocab"].items()}
        model["vocab"] = vocab | {names[token["content"]]: token["id"] for token in added}
    else:  # Unigram：[词, 分数] 的列表，id 是次序
        vocab = [[names.get(word, word), score] for word, score in model["vocab"]]
        later = sorted((token["id"], token["content"]) for token in added if token["id"] >= len(vocab))
        model["vocab"] = vocab + [[names[content], -1e9] for _, content in later]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in added:
        token["content"] = names[token["content"]]
    made = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    for token in added:
        if made.token_to_id(token["content"]) != token["id"]:
            raise ValueError(f"id {token['id']} 变了")
    return made, names


@dataclass
class TypedControls:
    """这一段对话里有控制 token 的字样。

    Args:
        breaker: 做记号的字，正文里没有。
        controls: 认控制 token 的正则。
        example: 正文里的一个字样，报错用。
    """

    breaker: str
    controls: re.Pattern
    example: str

    @classmethod
    def needed(cls, messages: list[dict], tools: list[dict], names: list[str]) -> TypedControls | None:
        controls = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        texts = list(_strings([messages, tools]))
        found = [m[0] for s in texts if (m := controls.search(s))]
        if not found:
            return None
        used = set().union(*texts)
        breaker = next(chr(c) for c in range(0xF0002, 0xFFFFE) if chr(c) not in used)
        return cls(breaker, controls, found[0])

    def messages(self, messages: list[dict]) -> list[dict]:
        """做记号；助手正文里的 ``<think>`` 之类是可信的，不做。"""
        return [
            {
                key: value
                if key == "role"
                else self.mark(value, key == "content" and m["role"] == "assistant")
                for key, value in m.items()
            }
            for m in messages
        ]

    def mark(self, value: Any, trusted: bool = False) -> Any:
        """字样的第一个字之后插一个记号，与控制 token 就对不上了。"""
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {self.mark(key): self.mark(inner) for key, inner in value.items()}
        if not isinstance(value, str):
            return value

        def broken(match: re.Match) -> str:
            return (
                match[0] if trusted and match[0] in REPLY_TAGS else match[0][0] + self.breaker + match[0][1:]
            )

        return self.controls.sub(broken, value)

    def finish(self, text: str, names: dict[str, str]) -> str:
        """渲染好的全文：结构里的控制 token 改名，记号拿掉。"""
        text = self.controls.sub(lambda match: names[match[0]], text)
        return text.replace(self.breaker, "")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
