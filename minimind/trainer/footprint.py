"""训练要多少内存：按结构数出来，不必跑一步；开训前说一声，也用来算一张卡放得下多大的批；真的不够时说清该动哪个参数。

数的是逐算子执行、自动混合精度下留给反向的中间结果，一个一个对着 model_minimind.py 数；编译之后有些会重算，用得更少。
与实测的对照：CPU 上是 ``saved_tensors_hooks`` 数出的字节，一张 H200 上是分配器的最高值（tests/trainer/test_footprint.py）。
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from minimind.console import say
from minimind.errors import UserError
from minimind.model import MiniMindConfig
from minimind.model.model_minimind import MiniMindModel
from minimind.trainer.optim import split_parameters

T = TypeVar("T")
# torch.OutOfMemoryError 之外的：NPU、MPS 与 CPU 的分配器只抛 RuntimeError，认它们的话
SAYINGS = ("out of memory", "can't allocate memory", "not enough memory")
GB = 1e9
FULL, INDEX = 4, 8  # fp32 与下标各几个字节
CARD_OVERHEAD = 0.8 * GB  # 显卡上下文、矩阵乘的工作区，不归分配器管
FRAGMENTS = 0.10  # 分配器切剩下的，与没数到的零碎：H200 上实测比数出来的多 5 % 到 9 %


@dataclass(frozen=True)
class Footprint:
    """一步训练的内存，字节。

    weights: 参数；state: 优化器的状态；gradients: 梯度；casts: 半精度的权重副本，随前向留到反向（重算的层不留）；
    activations: 中间结果；transient: 前向走完那一刻临时的：一块的 logits，或一层反向途中的梯度（与重算出来的），取大的；
    update: 优化器那一步临时的；accumulates: 几个微批次合成一步，梯度在前向时也占着。
    """

    weights: int
    state: int
    gradients: int
    casts: int
    activations: int
    transient: int
    update: int
    accumulates: bool = False

    @property
    def peak(self) -> int:
        """最高值：前向刚走完（累积梯度时梯度也在），或优化器那一步。"""
        fixed = self.weights + self.state
        forward = fixed + self.casts + self.activations + self.transient
        forward += self.gradients if self.accumulates else 0
        return max(forward, fixed + self.gradients + self.update)


def layer_bytes(config: MiniMindConfig, half: bool) -> float:
    """一层里一个词元留给反向的中间结果，字节。``half``：矩阵乘用半精度（残差仍是 fp32）。"""
    H, D, size = config.hidden_size, config.head_dim, 2 if half else FULL
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    total = 2 * (FULL * H + FULL + size * H)  # 两处归一化：输入、每行一个数、输出（即各投影的输入）
    total += (
        size * (q + 2 * kv) + size * q + FULL * config.num_attention_heads
    )  # q、k、v，输出，每行的归一化常数
    if config.arch == "v3":  # 旋转之前逐头归一化：输入（半精度先转成 fp32）与每头一个数
        heads = config.num_attention_heads + config.num_key_value_heads
        total += (size + (FULL if half else 0)) * (q + kv) / (2 if half else 1) + FULL * heads
    if not config.use_moe:
        return total + 4 * size * config.intermediate_size  # gate、up、silu(gate)、乘积
    K, shared, E = config.num_experts_per_tok, config.n_shared_experts, config.n_routed_experts
    total += 4 * size * config.moe_intermediate_size * (K + shared)
    total += 2 * size * H * K  # 分发给各专家的输入，与乘门控之前的输出
    total += (FULL * H if half else 0) + 3 * FULL * E + 6 * INDEX * K  # 路由器的 fp32 输入、概率，排好的次序
    return total


def ends_bytes(config: MiniMindConfig, half: bool) -> int:
    """各层之外一个词元的中间结果：下标与标签、位置编码、末尾归一化的输入、损失里备好的梯度。"""
    H, size = config.hidden_size, 2 if half else FULL
    return 4 * INDEX + 2 * FULL * config.head_dim + (FULL + size) * H


def loss_chunk_bytes(config: MiniMindConfig, tokens: int, half: bool, on_cpu: bool) -> int:
    """分块交叉熵：一块的 logits（原样、fp32、对数概率、梯度），与整块的输出头梯度。"""
    V, size = config.vocab_size, 2 if half else FULL
    rows = min(tokens, 512 if on_cpu else max(1024, 2**25 // V))  # 同 linear_cross_entropy
    return rows * V * (2 * size + 2 * FULL) + FULL * V * config.hidden_size


def backward_bytes(config: MiniMindConfig, half: bool) -> int:
    """一层反向途中一个词元的梯度：前馈的三份，残差的两份。"""
    chosen = config.num_experts_per_tok + config.n_shared_experts if config.use_moe else 1
    width = (config.moe_intermediate_size if config.use_moe else config.intermediate_size) * chosen
    return 3 * (2 if half else FULL) * width + 2 * FULL * config.hidden_size


def recompute_layers(model: nn.Module, layers: str) -> None:
    """``--checkpoint_layers``：每个主干（强化学习的价值网络也有一个）的前几层反向时重算。

    Raises:
        UserError: 比模型的层数还多。
    """
    trunks = [module for module in model.modules() if isinstance(module, MiniMindModel)]
    for trunk in trunks:
        trunk.gradient_checkpointing = len(trunk.layers) if layers == "all" else int(layers)
        if trunk.gradient_checkpointing > len(trunk.layers):
            raise UserError(
                f"要重算 {layers} 层",
                where="--checkpoint_layers",
                expected=f"至多 {len(trunk.layers)} 层，这个模型的全部",
                fix="全部重算写 --checkpoint_layers all",
            )


def recomputed_layers(config: MiniMindConfig, choice: int | str) -> int:
    """``--checkpoint_layers`` 是几层。"""
    layers = config.num_hidden_layers
    return layers if choice == "all" else min(int(choice), layers)


def activation_bytes(
    config: MiniMindConfig, tokens: int, *, half: bool = True, checkpoint_layers: int | str = 0
) -> int:
    """一个微批次（``tokens`` 个位置）留给反向的中间结果，字节，不含权重的副本。"""
    again = recomputed_layers(config, checkpoint_layers)
    kept = (config.num_hidden_layers - again) * layer_bytes(config, half) + again * FULL * config.hidden_size
    return round(tokens * (kept + ends_bytes(config, half)))


def footprint(
    model: nn.Module,
    tokens: int,
    *,
    half: bool = True,
    optimizer: str = "muon",
    checkpoint_layers: int | str = 0,
    accumulates: bool = False,
    on_cpu: bool = False,
) -> Footprint:
    """``model``（可以在 meta 设备上）每个微批次 ``tokens`` 个位置时的内存。

    Args:
        half: 半精度的自动混合精度；假是 fp32。
        optimizer: ``--optimizer``。
        checkpoint_layers: ``--checkpoint_layers``。
        accumulates: 几个微批次合成一步（梯度在前向时也占着）。
        on_cpu: 损失的块长随设备不同。
    """
    config = model.config
    groups = {kind: sum(p.numel() for p in params) for kind, params in split_parameters(model).items()}
    trainable, matrices = sum(groups.values()), groups["matrix"]
    every = sum(p.numel() for p in model.parameters())
    in_layers = sum(p.numel() for p in model.model.layers.parameters())
    momentum = matrices if optimizer == "muon" else 0  # Muon 一份动量，AdamW 两份
    shapes: Counter[tuple[int, ...]] = Counter()
    for p in split_parameters(model)["matrix"]:
        shapes[tuple(p.shape)] += p.numel()
    largest = max(shapes.values(), default=0) if optimizer == "muon" else 0
    again = recomputed_layers(config, checkpoint_layers)
    kept = 1 - again / config.num_hidden_layers
    backward = tokens * (backward_bytes(config, half) + (layer_bytes(config, half) if again else 0))
    return Footprint(
        weights=FULL * every,
        state=FULL * (momentum + 2 * (trainable - momentum)),
        gradients=FULL * trainable,
        casts=round(2 * kept * in_layers) if half else 0,
        activations=activation_bytes(config, tokens, half=half, checkpoint_layers=checkpoint_layers),
        transient=max(loss_chunk_bytes(config, tokens, half, on_cpu), round(backward)),
        update=largest * (2 * FULL + 3 * 2),  # 同形状的一批：Nesterov、堆起来的一份，迭代里的三份
        accumulates=accumulates,
    )


def largest_rows(model: nn.Module, card_gb: float, length: int, **options: Any) -> int:
    """``card_gb`` GB 的卡上，每行 ``length`` 时一个微批次至多几行；一行也放不下是 0。"""
    room = (card_gb * GB - CARD_OVERHEAD) / (1 + FRAGMENTS)
    low, high = 0, 1
    while footprint(model, high * length, **options).peak <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = footprint(model, middle * length, **options).peak <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def describe(found: Footprint) -> str:
    """一句话：``6.2 GB（参数、梯度与优化器 0.4，中间结果 5.4，其余 0.4）``。"""
    fixed = found.weights + found.state + found.casts + (found.gradients if found.accumulates else 0)
    rest = max(found.peak - fixed - found.activations, 0)
    parts = f"参数与优化器 {fixed / GB:.1f}，中间结果 {found.activations / GB:.1f}，其余 {rest / GB:.1f}"
    return f"{found.peak / GB:.1f} GB（{parts}）"


def announce_memory(run: Any) -> None:
    """预计的内存；卡上放不下就先说该动哪个参数，不等它走到一半。

    不是只有一个 MiniMind 的交叉熵训练（另有教师、价值网络、采样的缓存）时数不全，不说。
    """
    args, length = run.args, getattr(run.data.train, "row_length", None)
    if not (run.recipe.cross_entropy and length and isinstance(run.config, MiniMindConfig)):
        return
    found = footprint(
        run.model,
        args.batch_size * length,
        half=run.dtype != torch.float32,
        optimizer=args.optimizer,
        checkpoint_layers=args.checkpoint_layers,
        accumulates=args.accumulation_steps > 1,
        on_cpu=run.device.type == "cpu",
    )
    say(f"预计{'内存' if run.device.type == 'cpu' else '显存'} {describe(found)}。")
    if run.device.type == "cuda":
        room = torch.cuda.mem_get_info(run.device)[0] + torch.cuda.memory_reserved(run.device)
        if found.peak > room:
            say(f"留意：卡上只剩 {room / GB:.1f} GB，多半放不下；可以 {remedies(args)}。")


# ---------------------------------------------------------------- 不够的时候


def is_out_of_memory(error: BaseException) -> bool:
    """是不是设备或主机的内存不够。"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SAYINGS)


def remedies(args: Any) -> str:
    """按代价从小到大的办法，各带现在的值；已经到头的不提。

    Args:
        args: :class:`minimind.trainer.train_args.TrainArguments` 或其子类。
    """
    ways = []
    if args.batch_size > 1:
        half = args.batch_size // 2
        more = -(-args.batch_size * args.accumulation_steps // half)
        ways.append(
            f"--batch_size {half} --accumulation_steps {more}"
            f"（现在 {args.batch_size} 与 {args.accumulation_steps}；每步的样本不少，只是分几次算）"
        )
    rows = getattr(args, "rows_per_forward", 1)
    if rows > 1:
        ways.append(f"--rows_per_forward {rows // 2}（现在 {rows}；打分与更新时一次少算几条）")
    if args.checkpoint_layers != "all":
        ways.append(
            f"--checkpoint_layers all（现在 {args.checkpoint_layers}；结果不变，多花至多三分之一的时间）"
        )
    if args.max_seq_len > 64:
        ways.append(
            f"--max_seq_len {args.max_seq_len // 2}（现在 {args.max_seq_len}；长文会切开或截短，要从头训练）"
        )
    return "；或 ".join(ways) or "换小一号的 --preset，或内存大的设备"


def explain_out_of_memory(train: Callable[..., T]) -> Callable[..., T]:
    """包住 ``train(args, …)``：内存不够变成一句说得出办法的 :class:`UserError`。"""

    @functools.wraps(train)
    def wrapped(args: Any, *rest: Any, **named: Any) -> T:
        try:
            return train(args, *rest, **named)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"内存不够：{first}",
                where="训练",
                fix=f"{remedies(args)}。此前的存档没有动，前几样换好后加 --from_resume 1 接着训练",
            ) from error

    return wrapped
