"""服务器上的模型：底座与各个 LoRA，每个名字一个引擎，权重共用一份（:mod:`minimind.inference.shared`）。"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from minimind.inference.loading import Loaded, stop_ids
from minimind.serve.errors import ApiError
from minimind.serve.grammar import GrammarFactory
from minimind.serve.runner import EngineRunner
from minimind.tokenizer.vocabulary import vocabulary_of


@dataclass
class ServedModel:
    """一个可以请求的模型。

    Args:
        id: 客户端写的名字。
        loaded: 底座与分词器；LoRA 的增量在它的引擎里。
        parent: LoRA 的底座叫什么；底座自己是 ``None``。
    """

    id: str
    loaded: Loaded
    runner: EngineRunner
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.tokenizer: Any = self.loaded.tokenizer
        self.vocabulary = vocabulary_of(self.tokenizer)
        self.eos_ids = stop_ids(self.loaded.model, self.tokenizer)
        self.grammar = GrammarFactory(self.tokenizer, self.loaded.model.config.vocab_size, self.vocabulary)

    def card(self) -> dict[str, Any]:
        """``/v1/models`` 里的一项。"""
        card = {"id": self.id, "object": "model", "created": self.created, "owned_by": "minimind"}
        card |= {"max_model_len": self.runner.max_length, "parent": self.parent}
        return card


class ModelTable:
    """名字 → 模型。

    Args:
        models: 第一个是底座；请求不写 ``model`` 时用它。
    """

    def __init__(self, models: list[ServedModel]):
        self.models = {model.id: model for model in models}
        self.default = models[0]

    def find(self, name: str | None) -> ServedModel:
        """
        Raises:
            ApiError: 没有这个名字（404）。
        """
        if name is None or name == "":
            return self.default
        if name not in self.models:
            raise ApiError(
                404,
                f"没有模型 {name[:80]!r}，有：{'、'.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    @property
    def runners(self) -> list[EngineRunner]:
        return [model.runner for model in self.models.values()]
