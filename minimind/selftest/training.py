"""优化器的一步、权重的存取、中断再续：都走训练真正用的那些函数。"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.console import console
from minimind.dataset import collate_packed
from minimind.runtime.checkpoint import load_file, load_weights, read_sidecar, resume_path, save_weights
from minimind.selftest.numerics import PRECISIONS, nan_is_worst
from minimind.selftest.rows import Check, Measure, Outcome
from minimind.selftest.toys import HIDDEN, matmul_precision, on_device, packed_row, toy_model
from minimind.trainer.loop import train
from minimind.trainer.optim import NEWTON_SCHULZ, RMS_MATCH, build_optimizer, set_learning_rate
from minimind.trainer.recipe import Data, Recipe, language_model_loss
from minimind.trainer.train_args import TrainArguments

# ---------------------------------------------------------------- 优化器

STEPS, LEARNING_RATE = 3, 1e-2
# 更新量的相对差。bf16 的 Newton–Schulz 每步舍入约 0.4 %，五步里再放大
UPDATE_LIMITS = {"float32": 1e-3, "bfloat16": 0.05}


def gradients_of(parameters: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """第 ``step`` 步的梯度：随机，但两边相同。"""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


def textbook_update(parameters: dict[str, Tensor], args: TrainArguments) -> dict[str, Tensor]:
    """逐个参数、float64、照公式写的 AdamW 与 Muon：走 ``STEPS`` 步之后的参数。"""
    after = {}
    for name, start in parameters.items():
        p = start.double()
        embedding, matrix = "embed_tokens" in name, start.ndim == 2
        matrix = matrix and not embedding
        lr = args.learning_rate
        if embedding and args.optimizer == "muon":
            lr *= args.embed_lr_scale
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for step in range(1, STEPS + 1):
            g = gradients_of(parameters, step)[name].double()
            if matrix:
                p = p * (1 - lr * args.weight_decay)
            if matrix and args.optimizer == "muon":
                m = args.muon_momentum * m + (1 - args.muon_momentum) * g
                u = (1 - args.muon_momentum) * g + args.muon_momentum * m
                p = p - lr * RMS_MATCH * max(p.shape) ** 0.5 * textbook_orthogonalize(u)
            else:
                m, v = 0.9 * m + 0.1 * g, args.adam_beta2 * v + (1 - args.adam_beta2) * g**2
                m_hat, v_hat = m / (1 - 0.9**step), v / (1 - args.adam_beta2**step)
                p = p - lr * m_hat / (v_hat.sqrt() + 1e-8)
        after[name] = p
    return after


def textbook_orthogonalize(matrix: Tensor) -> Tensor:
    """由奇异值分解直接算 Newton–Schulz 的结果：奇异向量不变，奇异值过五遍那个五次多项式。"""
    a, b, c = NEWTON_SCHULZ
    u, s, vt = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


def optimizer_check(optimizer: str, newton_schulz: str, device: torch.device) -> Outcome:
    """走几步，各参数的更新量与照公式写的比。"""
    args = TrainArguments(optimizer=optimizer, learning_rate=LEARNING_RATE)
    start = {name: p.detach().clone() for name, p in toy_model("v3").named_parameters()}
    model = on_device(toy_model("v3"), device)
    with matmul_precision("highest"):
        stepper = build_optimizer(model, args, newton_schulz_dtype=newton_schulz)
        for step in range(1, STEPS + 1):
            grads = gradients_of(start, step)
            for name, p in model.named_parameters():
                p.grad = grads[name].to(device)
            set_learning_rate(stepper, LEARNING_RATE)
            stepper.step()
    errors = {}
    for name, want in textbook_update(start, args).items():
        got, want = model.get_parameter(name).detach().cpu().double() - start[name], want - start[name]
        errors[name] = float((got - want).norm() / want.norm())
    worst = max(errors, key=lambda name: nan_is_worst(errors[name]))
    limit = UPDATE_LIMITS[newton_schulz]
    good = errors[worst] <= limit
    return Outcome([Measure("更新量差", errors[worst], high=limit)], "" if good else f"最差的是 {worst}")


# ---------------------------------------------------------------- 存取


def weights_check(device: torch.device) -> Outcome:
    """存成 fp16 的权重再读回来：每个数都恰好是原来的数舍入到 fp16，旁注也在。"""
    model = on_device(toy_model("v3"), device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "selftest.pth"
        save_weights(model, path, {"recipe": "selftest", "step": 7})
        sidecar = read_sidecar(path) or {}
        back = on_device(toy_model("v3", seed=1), device)
        load_weights(back, path)
    wrong = sum(
        int((got.cpu() != want.cpu().half().float()).sum())
        for got, want in zip(back.state_dict().values(), model.state_dict().values())
    )
    measures = [Measure("不对的数", wrong, high=0), Measure("旁注里的步数", sidecar.get("step", -1), 7, 7)]
    return Outcome(measures)


# ---------------------------------------------------------------- 续训


class ToyRows:
    """训练用的小数据：每行一篇或两篇文档，``size`` 行，定长。"""

    def __init__(self, size: int = 16):
        generator = torch.Generator().manual_seed(3)
        self.rows = [packed_row((20 + index, 11, 33 - index), generator) for index in range(size)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Cut(Exception):
    """假装断电。"""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """里面的训练不打印日志。"""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def toy_train(
    folder: Path | str, device: torch.device, *, cut_at: int = 0, dropout: float = 0.0, **changes: Any
) -> dict[str, Tensor]:
    """训练六步，返回最后的权重（CPU 上）。

    Args:
        cut_at: 第几次前向时抛 :class:`Cut`；0 表示一直练完。
        changes: 改命令行参数。
    """
    settings = {
        "save_dir": f"{folder}/out",
        "checkpoint_dir": f"{folder}/checkpoints",
        "save_weight": "selftest",
        "hidden_size": HIDDEN,
        "batch_size": 2,
        "max_steps": 6,
        "save_interval": 3,
        "eval_interval": 0,
        "num_workers": 0,
        "learning_rate": 3e-3,
        "device": str(device),
        "dtype": "float32",
    }
    args = TrainArguments(**{**settings, **changes})
    model = on_device(toy_model("v2", dropout=dropout), device)
    calls = 0

    def loss(wrapped: Any, batch: dict[str, Any]) -> tuple:
        nonlocal calls
        calls += 1
        if calls == cut_at:
            raise Cut
        return language_model_loss(wrapped, batch)

    with quiet(), contextlib.suppress(Cut):
        train(args, Recipe("selftest", loss, collate_packed), model, None, Data(ToyRows()))
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def dtype_name(precision: str) -> str:
    """``bf16`` → ``bfloat16``，即 ``--dtype`` 的写法。"""
    return str(PRECISIONS[precision].dtype).removeprefix("torch.")


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """两份权重最大差多少。"""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def started() -> dict[str, Tensor]:
    """:func:`toy_train` 开始时的权重。"""
    return toy_model("v2").state_dict()


def resume_check(dtype: str, device: torch.device) -> Outcome:
    """有 dropout 的训练：一口气六步，与第五步断电、从第三步的存档续上，最后的权重比。

    设备先自己与自己比（同样的训练跑两遍）：两遍逐位相同就要求续训也逐位相同；不然限度是两遍之差的十倍，
    至少是训练走过的千分之一，至多一成。
    """
    with tempfile.TemporaryDirectory() as root:
        folders = [f"{root}/{name}" for name in ("一", "二", "三")]
        options = {"device": device, "dropout": 0.1, "dtype": dtype}
        whole, again = toy_train(folders[0], **options), toy_train(folders[1], **options)
        toy_train(folders[2], cut_at=5, **options)
        saved = load_file(resume_path(toy_model("v2").config, "selftest", f"{folders[2]}/checkpoints"))
        resumed = toy_train(folders[2], from_resume=1, **options)
    noise = difference(whole, again)
    moved = difference(whole, started())
    limit = 0.0 if noise == 0 else min(max(10 * noise, 1e-3 * moved), 0.1 * moved)
    note = "设备可重复，要求逐位相同" if noise == 0 else f"设备不可重复：同样的训练两遍差 {noise:.1e}"
    measures = [
        Measure("续训差", difference(whole, resumed), high=limit),
        Measure("存档步数", saved["step"], 3, 3),
        Measure("权重变了", moved, low=1e-3),
    ]
    return Outcome(measures, note)


def training_checks(device: torch.device, default: str) -> list[Check]:
    """优化器、存取、续训各行；``default`` 是训练默认的精度。"""
    dtypes = ["fp32"] if default == "fp32" else ["fp32", default]
    return [
        Check("优化器", "AdamW", functools.partial(optimizer_check, "adamw", "float32", device)),
        Check("优化器", "Muon，fp32 迭代", functools.partial(optimizer_check, "muon", "float32", device)),
        Check("优化器", "Muon，bf16 迭代", functools.partial(optimizer_check, "muon", "bfloat16", device)),
        Check("存取", "权重 fp16", functools.partial(weights_check, device)),
        *(
            Check("存取", f"中断再续 {name}", functools.partial(resume_check, dtype_name(name), device))
            for name in dtypes
        ),
    ]
