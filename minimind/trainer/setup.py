"""开训之前：核对各进程、读存档、定精度、建优化器、包装模型、定随机数，得到一个 :class:`~minimind.trainer.run.Run`。"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minimind.console import say
from minimind.dataset.collate import to_device
from minimind.errors import UserError
from minimind.model.model_minimind import MiniMindModel
from minimind.runtime import checkpoint, distributed
from minimind.runtime.device import (
    DTYPES,
    autocast_context,
    choose_dtype,
    make_scaler,
    mix_seeds,
    peak_flops,
    preserved_rng,
    reuse_threads,
    seed_all,
    set_rng_state,
)
from minimind.runtime.fair_share import fair_share
from minimind.trainer import resume
from minimind.trainer.compiling import maybe_compile
from minimind.trainer.meter import Meter
from minimind.trainer.optim import build_optimizer
from minimind.trainer.progress import Progress
from minimind.trainer.recipe import Data, Recipe
from minimind.trainer.run import Run
from minimind.trainer.samples import Sampler
from minimind.trainer.tracking import Journal
from minimind.trainer.vital_signs import VitalSigns


def set_up(args: Any, recipe: Recipe, model: nn.Module, tokenizer: Any, data: Data) -> Run:
    """建好训练所需的一切；``args.from_resume`` 时从存档还原。参数同 :func:`minimind.trainer.loop.train`。

    Raises:
        UserError: 存档与当前设置不符，数据为空，没装记录工具……
    """
    if len(data.train) == 0:
        raise UserError(
            "训练数据是空的", where="--data_path", fix="换一个文件，或用 minimind data check 检查它"
        )
    if recipe.weights is None:
        weights = checkpoint.weights_path(model.config, args.save_weight, args.save_dir)
        recipe = replace(recipe, weights=weights)
    device = next(model.parameters()).device
    recompute_layers(model, args.checkpoint_layers)
    model.train()
    identity = resume.identity_of(recipe, data, tokenizer)
    resume.check_same_everywhere(identity, model, data)
    saved = resume.load(args, model, identity) if args.from_resume else {}

    numerics = decide_numerics(args, recipe, model, data, saved.get("numerics", {}))
    dtype = DTYPES[numerics["dtype"]]
    optimizer = build_optimizer(
        model, args, newton_schulz_dtype=numerics["dtype"], lr_scales=recipe.lr_scales
    )
    scaler = make_scaler(device, dtype)
    state = Progress(args, len(data.train), distributed.world_size(), **saved.get("progress", {}))
    if saved:
        resume.restore(saved, model, optimizer, scaler, state, recipe)
        resume.say_changes(saved, args, recipe, data, state)
    samples = Sampler.for_run(args, recipe.name, model.config, tokenizer)
    run = Run(
        args=args,
        recipe=recipe,
        data=data,
        tokenizer=tokenizer,
        model=model,
        wrapped=model,
        optimizer=optimizer,
        scaler=scaler,
        numerics=numerics,
        state=state,
        vitals=VitalSigns(model, saved.get("vitals")),
        meter=Meter(eval_guess_steps=guess_evaluation(args, recipe, data, state)),
        journal=Journal.open(args, recipe, state, saved),
        samples=samples,
    )
    run.wrapped = wrap(run)
    seed(run, saved)
    return run


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


def decide_numerics(
    args: Any, recipe: Recipe, model: nn.Module, data: Data, remembered: dict[str, Any]
) -> dict[str, Any]:
    """设备、精度、峰值、线程数：要现场测的只由主进程测一次、所有进程照办，并写进存档供续训沿用。

    强化学习的样本只是提示，要先采样才有得训练，CPU 上就不测，用 float32（采样与训练的概率要对得上）。

    Args:
        remembered: 存档里的同一份；重新训练时是空的。
    """
    device = next(model.parameters()).device
    if device.type == "cpu" and "threads" in remembered:
        reuse_threads(remembered["threads"], say)
    decided = None
    if distributed.is_main_process():
        if args.dtype == "auto" and remembered.get("device") == device.type:
            dtype = DTYPES[remembered["dtype"]]
        elif args.dtype == "auto" and recipe.prepare is not None and device.type == "cpu":
            dtype = torch.float32
        else:
            dtype = choose_dtype(args.dtype, device, lambda dtype: probe(recipe, model, data, dtype))
        decided = {
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "peak_flops": peak_flops(device, dtype),
            "threads": fair_share().most,
        }
    numerics = distributed.broadcast_object(decided)
    for key, name in (("device", "设备"), ("dtype", "计算精度")):
        if key in remembered and remembered[key] != numerics[key]:
            say(f"注意：{name}由 {remembered[key]} 变为 {numerics[key]}，舍入随之不同。")
    return numerics


def probe(recipe: Recipe, model: nn.Module, data: Data, dtype: torch.dtype) -> None:
    """用真模型、真数据的两行做一次前向反向，供 CPU 上比较 fp32 与 bf16。"""
    device = next(model.parameters()).device
    batch = recipe.collate([data.train[i] for i in range(min(2, len(data.train)))])
    with preserved_rng(device):
        with autocast_context(device, dtype):
            loss, _ = recipe.loss(model, to_device(batch, device, dtype))
        (loss / max(recipe.count(batch), 1.0)).backward()
    model.zero_grad(set_to_none=True)


def guess_evaluation(args: Any, recipe: Recipe, data: Data, state: Progress) -> float:
    """还没验证过时，猜一次验证抵多少个训练步。"""
    if data.val is None:  # 只有 on_eval：强化学习作答留出的题，与一步的采样相当
        return 0.0 if recipe.on_eval is None else 1.0
    rows = min(len(data.val), args.val_max_rows or len(data.val))
    # 验证只有前向，约为训练的三分之一
    return rows / (state.global_batch * args.accumulation_steps) / 3


def wrap(run: Run) -> nn.Module:
    """compile 在里、DDP 在外。"""
    wrapped = maybe_compile(run.model, run.args.use_compile, run)
    if not torch.distributed.is_initialized():
        return wrapped
    # 不给 device_ids：给了它会把批里的张量再搬一遍，连留在主机的段界一起
    return DistributedDataParallel(wrapped, gradient_as_bucket_view=True)


def seed(run: Run, saved: dict[str, Any]) -> None:
    """最后才定随机数：前面的测速不影响它。各进程的 dropout 不同；进程数变了就按步数另起一条。"""
    rank = distributed.rank()
    if saved and saved["world_size"] == distributed.world_size():
        set_rng_state(saved["rng"][rank], run.device)
    else:
        seed_all(mix_seeds(run.args.seed, run.state.step, rank))
