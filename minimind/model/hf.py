"""与 transformers 打交道的唯一地方：随版本变的名字、绑定、初始化的钩子、``generate``、``Trainer`` 都收在这里。

模型本身（model_minimind.py 的 :class:`MiniMindLM`）只用 torch；训练、引擎、服务、评测走它的前向与它自己的输出。
这个文件随导出的目录走，所以只相对引用旁边的模型文件。它连带 transformers 的一千多个模块（约 2 s 处理器时间），
``MiniMindForCausalLM`` 被用到时才读入。
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .model_minimind import EMBEDDING, HEAD, MiniMindConfig, MiniMindLM, MiniMindOutput

# 缓存的名字：5.24 起叫 cache，之前叫 past_key_values。第一个是本项目自己用的
CACHE_NAMES = ("past_key_values", "cache")
# generate 与 Trainer 会带上、对这个模型没有作用的参数；别的名字一律报错，不悄悄吞掉
_NO_EFFECT = {"cache_position"}
_NOT_KEPT = ("output_attentions", "output_hidden_states")
_FIELDS = frozenset(MiniMindOutput.__dataclass_fields__)


def _is_cache(value: Any) -> bool:
    """按本事认缓存，不按类名：下一版再给它改名，照样认得。"""
    return hasattr(value, "update") and hasattr(value, "get_seq_length")


class HFOutput(MiniMindOutput, dict):
    """transformers 要的输出：按属性、按键、按下标都能取，缓存的每个名字都答应。

    下标与解包是它的惯例 ``(loss, logits, 缓存)``，没有的跳过。
    """

    cache_names: tuple[str, ...] = CACHE_NAMES

    def __init__(self, values: Any = (), /, **named: Any):
        # 收一个字典或一串对：DataParallel 与 accelerate 这样重建它
        MiniMindOutput.__init__(self, **{self._name(k): v for k, v in {**dict(values), **named}.items()})

    def __setattr__(self, name: str, value: Any) -> None:  # 属性与键总是同一个值
        name = self._name(name)
        object.__setattr__(self, name, value)
        if name in _FIELDS and value is not None:
            dict.__setitem__(self, name, value)
        elif name in _FIELDS:
            dict.pop(self, name, None)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def _name(self, key: Any) -> Any:
        return CACHE_NAMES[0] if key in self.cache_names else key

    def __getattr__(self, name: str) -> Any:  # 只在没有这个属性时才来：别的版本给缓存起的名字
        if name in self.__dict__.get("cache_names", ()):
            return self.past_key_values
        raise AttributeError(f"{type(self).__name__} 没有 {name}")

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, self._name(key))

    def __getitem__(self, key: Any) -> Any:
        return dict.__getitem__(self, self._name(key)) if isinstance(key, str) else self.to_tuple()[key]

    def get(self, key: str, default: Any = None) -> Any:
        return dict.get(self, self._name(key), default)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v for v in (self.loss, self.logits, self.past_key_values) if v is not None)


class MiniMindForCausalLM(MiniMindLM, PreTrainedModel, GenerationMixin):
    """带语言模型头的 MiniMind，能 ``from_pretrained``、``save_pretrained``、``generate``，能交给 ``Trainer`` 与 peft。

    权重名与公开版相同，词嵌入与输出头共享。
    """

    config_class = MiniMindConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {HEAD: EMBEDDING}  # 存盘时只写一份
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer 据此把整个累积窗口的目标数 num_items_in_batch 交给前向

    def __init__(self, config: MiniMindConfig | None = None):
        PreTrainedModel.__init__(self, config or MiniMindConfig())
        self.build()
        self.post_init()  # 登记存盘与读入要的属性
        self.check_tied()

    # fmt: off
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HFOutput | tuple[Any, ...]:
        # fmt: on
        """一次前向；参数与结果见 :meth:`MiniMindLM.forward`，这里多的是：

        Args:
            past_key_values, cache: 同一个缓存的新旧两个名字，给一个。
            use_cache: 没给缓存时新建一个。
            num_items_in_batch: 给了就让 ``loss = loss_sum / num_items_in_batch``：``Trainer`` 梯度累积时，
                分母是整个窗口的目标数，而不是这一小批的。
            return_dict: False 时返回 ``(loss, logits, 缓存)``。

        Raises:
            TypeError: 不认识的参数，或缓存给了两次。
            ValueError: 要每层的注意力或隐藏状态。
        """
        given = {n: v for n, v in ((CACHE_NAMES[0], past_key_values), ("cache", cache)) if v is not None}
        if kwargs:
            given |= self._sort_out(kwargs)
        if len(given) > 1:
            raise TypeError(f"{'、'.join(given)} 是同一个缓存的几个名字，只能给一个")
        name, cache = next(iter(given.items()), (None, None))
        if use_cache and cache is None:
            cache = _new_cache()
        placed = _Placed(cache) if cache is not None and _wants_position(type(cache)) else cache
        out = MiniMindLM.forward(
            self, input_ids, attention_mask, position_ids, placed, labels, loss_weights, cu_seqlens, max_seqlen,
            logits_to_keep, return_logits, inputs_embeds,
        )  # fmt: skip
        if num_items_in_batch is not None and out.loss_sum is not None:
            out.loss = out.loss_sum / _at_least_one(num_items_in_batch, out.loss_sum)
        presented = HFOutput(
            loss=out.loss, loss_sum=out.loss_sum, target_count=out.target_count, aux_loss=out.aux_loss,
            logits=out.logits, past_key_values=cache, hidden_states=out.hidden_states,
        )  # fmt: skip
        if name is not None and name not in CACHE_NAMES:
            presented.cache_names = (*CACHE_NAMES, name)
        return presented if return_dict is None or return_dict else presented.to_tuple()

    @staticmethod
    def _sort_out(kwargs: dict[str, Any]) -> dict[str, Any]:
        """多出来的参数里，缓存（叫什么都行）挑出来，不认识的报错。"""
        caches = {name: value for name, value in kwargs.items() if _is_cache(value)}
        wanted = [name for name in _NOT_KEPT if kwargs.get(name)]
        if wanted:
            raise ValueError(f"{'、'.join(wanted)} 不支持：前向不留各层的中间结果，只给末层的 hidden_states")
        unknown = [
            name
            for name, value in kwargs.items()
            if value is not None and value is not False and name not in (*caches, *_NO_EFFECT)
        ]
        if unknown:
            raise TypeError(f"forward 不认识参数 {unknown}，请检查拼写")
        return caches

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """``generate`` 要交给前向的东西在这里收口：各版本自己的记号不传下去（用户拼错的名字 generate 先已拒绝）。"""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {
            name: value
            for name, value in inputs.items()
            if name in _FORWARD or name in _NOT_KEPT or _is_cache(value)
        }

    # ------------------------------------------------------------ 初始化、绑定、读入

    def init_weights(self) -> None:
        """空的：初始化与绑定在 :meth:`MiniMindLM.build` 里做完了，不随版本变。"""

    def _init_weights(self, module: nn.Module) -> None:
        # transformers 只在补缺的权重（from_pretrained 尺寸不合、扩词表）时调用；读进来的带着标记，不动
        if not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)):
            self.init_module(module)

    def tie_weights(self, missing_keys: set[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """绑定；``missing_keys`` 是 ``from_pretrained`` 给的、文件里没有的键，绑上的从中去掉。

        Raises:
            ValueError: 文件里两份都有而不相等。
        """
        if not self.config.tie_word_embeddings:
            return
        if missing_keys is None:
            return self.tie()
        if HEAD not in missing_keys:
            if EMBEDDING in missing_keys:  # 文件里只有输出头
                self.model.embed_tokens.weight = self.lm_head.weight
                missing_keys.discard(EMBEDDING)
            self.check_same(self.model.embed_tokens.weight, self.lm_head.weight)
        self.tie()
        missing_keys.discard(HEAD)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """同 ``PreTrainedModel.from_pretrained``，但权重文件不完整是错误，不会随机补上再当作读好了。

        Raises:
            ValueError: 缺权重（给了 ``output_loading_info=True`` 的人自己看），或词嵌入与输出头不相等。
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = set(info["missing_keys"]) - ({HEAD} if model.config.tie_word_embeddings else set())
        if missing and not output_loading_info:
            some = "、".join(sorted(missing)[:3])
            raise ValueError(
                f"{args[0] if args else ''} 的权重不完整：缺 {len(missing)} 个，例如 {some}。"
                "请检查 config.json 的尺寸与权重文件是否配套"
            )
        if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
            model.check_same(model.model.embed_tokens.weight, model.lm_head.weight)
            model.tie()
        model.check_tied()
        return (model, info) if output_loading_info else model

    # ------------------------------------------------------------ 别的工具的接口

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """反向时重算各层，不存中间结果。

        Raises:
            ValueError: 要的做法这里没有（可重入的重算、隔几层、搬到主机）。
        """
        options = {**(gradient_checkpointing_kwargs or {}), **options}
        usual = {"use_reentrant": False, "every_n_layers": 1, "offload": False}
        odd = {k: v for k, v in options.items() if v is not None and usual.get(k, usual) != v}
        if odd:
            raise ValueError(f"梯度重算不支持 {odd}：只有每层都算、use_reentrant=False 这一种")
        self.model.gradient_checkpointing = self.config.num_hidden_layers

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing = 0

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """:meth:`gradient_checkpointing_enable` 在 transformers 5.24 起的名字。"""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        self.gradient_checkpointing_disable()

    def __setattr__(self, name: str, value: Any) -> None:
        # 不写成属性的 setter：值是 nn.Module 时，nn.Module 的 __setattr__ 绕过它
        if name == "loss_function":
            raise ValueError(
                "model.loss_function 换了也不起作用：损失在分块交叉熵里算。"
                "要换损失，给 Trainer 传 compute_loss_func，或自己用 model(…).logits 算"
            )
        super().__setattr__(name, value)


_FORWARD = frozenset(inspect.signature(MiniMindForCausalLM.forward).parameters) - {"self", "kwargs"}


class _Placed:
    """有的版本（如 5.0）的静态缓存要人告诉它写在哪里，不告诉就从 0 写起，把前文盖掉。"""

    def __init__(self, cache: Any):
        self.cache, self.start = cache, cache.get_seq_length()

    def get_seq_length(self) -> int:
        return self.start

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        position = torch.arange(self.start, self.start + key.shape[-2], device=key.device)
        return self.cache.update(key, value, layer_idx, {"cache_position": position})


@functools.cache
def _wants_position(kind: type) -> bool:
    return "cache_kwargs" in inspect.signature(kind.update).parameters


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _at_least_one(count: int | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(count, dtype=torch.float32, device=like.device).clamp_min(1)


def step_with_cache(model: nn.Module, input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """别家的模型走一步：缓存按它的前向认的名字交、按同一个名字取。

    Args:
        input_ids: [B, T]。
        cache: 上一步返回的，第一步 None。

    Returns:
        logits [B, T, V] 与新的缓存。
    """
    name = _cache_name(type(model))
    out = model(input_ids=input_ids, use_cache=True, **{name: cache})
    return out.logits, getattr(out, name)


@functools.cache
def _cache_name(kind: type[nn.Module]) -> str:
    names = inspect.signature(kind.forward).parameters
    return next((name for name in reversed(CACHE_NAMES) if name in names), CACHE_NAMES[0])


if not __name__.startswith("transformers_modules."):  # 导出目录里的那一份由 auto_map 找到，不顶掉装着的
    AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)
