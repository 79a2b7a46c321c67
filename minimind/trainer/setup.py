"""开训之前：进程组、设备、模型的尺寸；然后核对各进程、读存档、定精度、建优化器、包装模型、定随机数，
得到一个 :class:`~minimind.trainer.recipe.Run`。
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minimind.console import Meter, say
from minimind.dataset.collate import to_device
from minimind.errors import UserError
from minimind.model import MiniMindConfig
from minimind.model.presets import preset_sizes
from minimind.paths import resolve_path
from minimind.runtime import checkpoint, distributed
from minimind.runtime.device import (
    DTYPES,
    autocast_context,
    choose_dtype,
    make_scaler,
    mix_seeds,
    peak_flops,
    prepare_device,
    preserved_rng,
    resolve_device,
    reuse_threads,
    seed_all,
    set_rng_state,
)
from minimind.runtime.fair_share import fair_share
from minimind.runtime.files import check_writable
from minimind.runtime.weights import starting_arch
from minimind.trainer.archive import check_same_everywhere, identity_of
from minimind.trainer.footprint import recompute_layers
from minimind.trainer.journal import Journal
from minimind.trainer.optim import build_optimizer
from minimind.trainer.progress import Progress
from minimind.trainer.recipe import Data, Recipe, Run
from minimind.trainer.validation import guess_evaluation
from minimind.trainer.vital_signs import VitalSigns


def start_run(args: Any) -> torch.device:
    """训练命令的第一步：建进程组、查输出目录、选设备、设种子（各进程同一个种子，模型初始化才一致）。

    Raises:
        UserError: 没有这个设备，或输出目录写不了：训练几个小时之后才发现存不下就晚了。
    """
    local_rank = distributed.init_distributed_mode(args.device)
    # 没写明的参数有的由磁盘上有哪些权重而定（蒸馏的起点与学习率），各机器看到的可以不同，一律听主进程的
    vars(args).update(distributed.broadcast_object(vars(args)))

    def check_outputs() -> None:
        out, checkpoints = resolve_path(args.save_dir), resolve_path(args.checkpoint_dir)
        for folder, flag in ((out, "save"), (out / "logs", "save"), (checkpoints, "checkpoint")):
            check_writable(folder, f"--{flag}_dir")

    distributed.on_main(check_outputs)
    device = resolve_device(args.device, local_rank if torch.distributed.is_initialized() else None)
    prepare_device(device)
    seed_all(args.seed)
    return device


def model_config(args: Any, from_weight: str | None = None, **overrides: Any) -> MiniMindConfig:
    """由命令行参数得到模型配置；给了 ``--preset`` 就以它的尺寸为准。

    没写 ``--arch`` 时随预设或起点的权重（``from_weight``，默认是 ``args.from_weight``），都没说就是 v2。

    从头训练的初始化随优化器：Muon 用残差为零的，同样步数验证损失更低；AdamW 每个数走的步子有上限，从零起步反而慢，
    用普通的（docs/quality.md）。载入权重时它不起作用。

    v3 的混合专家只选一个专家，权重归一之后恒为 1，路由器从损失得不到梯度（7e-10，不归一 3e-3），所以从头训练时不归一；
    从已有的权重开始则照它训练时的（旁注里写着；公开的没有旁注，按归一）。
    """
    sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.num_hidden_layers}
    sizes["use_moe"] = bool(args.use_moe)
    try:
        sizes = preset_sizes(args.preset) if args.preset else sizes
        start = from_weight or args.from_weight
        sizes["arch"] = starting_arch(args.arch, args.preset, sizes, start, args.save_dir)
        config = MiniMindConfig(**{**sizes, "zero_init_residual": args.optimizer == "muon", **overrides})
    except ValueError as error:
        raise UserError(str(error), where="模型尺寸") from error
    if args.from_weight == "none" and config.arch == "v3" and config.num_experts_per_tok == 1:
        config.norm_topk_prob = False
    return config


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
    identity, saved = identity_of(recipe, data, tokenizer), {}
    check_same_everywhere(identity, model, data)
    if args.from_resume:
        from minimind.trainer import resume  # 从头训练的不必读它；样例、编译也是用到才读

        saved = resume.load(args, model, identity)

    numerics = decide_numerics(args.dtype, recipe, model, data, saved.get("numerics") or {})
    dtype = DTYPES[numerics["dtype"]]
    optimizer = build_optimizer(
        model, args, newton_schulz_dtype=numerics["dtype"], lr_scales=recipe.lr_scales
    )
    scaler = make_scaler(device, dtype)
    state = Progress(args, len(data.train), distributed.world_size(), **saved.get("progress", {}))
    if saved:
        resume.restore(saved, model, optimizer, scaler, state, recipe)
        resume.say_changes(saved, resume.changes(saved["args"], args), recipe, data, state)
    samples = None
    if tokenizer is not None and args.sample_prompts != "0":
        from minimind.trainer.samples import Sampler

        samples = Sampler.for_run(args.sample_prompts, recipe.name, model.config, tokenizer)
    journal = Journal.open(args, recipe.weights.stem, state.step if saved else None, saved.get("wandb_id"))
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
        meter=Meter(eval_guess_steps=guess_evaluation(recipe, data, state, args.val_max_rows)),
        journal=journal,
        samples=samples,
    )
    if samples and not run.evaluates and args.sample_prompts != type(args).sample_prompts:
        why = f"--val_ratio {args.val_ratio:g} 没有留出一行，也没有 --val_path"
        say(f"留意：没有验证集（{why}），--sample_prompts 的提示不会作答：样例随验证来。")
    if args.use_compile:
        from minimind.trainer.compiling import maybe_compile

        run.wrapped = maybe_compile(model, args.use_compile, run)
    if torch.distributed.is_initialized():  # 编译在里、DDP 在外
        # 不给 device_ids：给了它会把批里的张量再搬一遍，连留在主机的段界一起
        run.wrapped = DistributedDataParallel(run.wrapped, gradient_as_bucket_view=True)
    seed(run, saved)
    return run


def decide_numerics(
    wanted: str, recipe: Recipe, model: nn.Module, data: Data, remembered: dict[str, Any]
) -> dict[str, Any]:
    """设备、精度、峰值、线程数：要现场测的只由主进程测一次、所有进程照办，并写进存档供续训沿用。

    强化学习的样本只是提示，要先采样才有得训练，CPU 上就不测，用 float32（采样与训练的概率要对得上）。

    Args:
        wanted: ``--dtype``。
        remembered: 存档里的同一份；重新训练时是空的。
    """
    device = next(model.parameters()).device
    if device.type == "cpu" and "threads" in remembered:
        reuse_threads(remembered["threads"], say)
    decided = None
    if distributed.is_main_process():
        if wanted == "auto" and remembered.get("device") == device.type:
            dtype = DTYPES[remembered["dtype"]]
        elif wanted == "auto" and recipe.prepare is not None and device.type == "cpu":
            dtype = torch.float32
        else:
            dtype = choose_dtype(wanted, device, lambda dtype: probe(recipe, model, data, dtype))
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


def seed(run: Run, saved: dict[str, Any]) -> None:
    """最后才定随机数：前面的测速不影响它。各进程的 dropout 不同；进程数变了就按步数另起一条。"""
    rank = distributed.rank()
    if saved and saved["world_size"] == distributed.world_size():
        set_rng_state(saved["rng"][rank], run.device)
    else:
        seed_all(mix_seeds(run.args.seed, run.state.step, rank))
