"""一次训练运行的全部家当：精度、优化器、并行包装、进度、日志与存档；``loop.train`` 拿着它往下走。"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minimind.console import say
from minimind.dataset.collate import to_device
from minimind.errors import UserError
from minimind.model import MiniMindConfig, count_parameters, flops_per_token
from minimind.paths import resolve_path
from minimind.runtime import checkpoint, device, distributed
from minimind.runtime.fair_share import fair_share
from minimind.tokenizer import token_byte_lengths, tokenizer_fingerprint
from minimind.trainer import history, resuming
from minimind.trainer.compiling import CompiledBlocks, maybe_compile
from minimind.trainer.meter import Meter
from minimind.trainer.optim import build_optimizer
from minimind.trainer.progress import Progress, TrainState
from minimind.trainer.tracking import RunLog, Tracker, start_tracker
from minimind.trainer.vital_signs import VitalSigns

# 配置里与数学无关的键
IGNORED_CONFIG = ("dtype", "torch_dtype", "architectures", "_name_or_path", "flash_attn", "use_cache")


class Run:
    """建好训练所需的一切；``args.from_resume`` 时从存档还原。

    参数同 :func:`minimind.trainer.loop.train`；``evaluates`` 是“期间有没有验证要做”，``probes`` 是“能不能直接拿训练样本
    测速”：强化学习的样本只是提示，要先采样才有得训练，CPU 上就不测，用 float32（采样与训练的概率要对得上）。

    Raises:
        UserError: 存档与当前设置不符，数据为空，没装记录工具……
    """

    def __init__(
        self,
        args: Any,
        model: nn.Module,
        tokenizer: Any,
        train_ds: Any,
        compute_loss: Callable[..., Any],
        *,
        val_ds: Any,
        recipe: str,
        collate: Callable[[list[Any]], dict[str, Any]],
        extra_state: dict[str, Any],
        evaluates: bool,
        probes: bool = True,
        weights: Path | None = None,
        weights_of: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
        lr_scales: Mapping[str, float] | None = None,
        identity: Mapping[str, str] | None = None,
    ):
        if len(train_ds) == 0:
            raise UserError(
                "训练数据是空的", where="--data_path", fix="换一个文件，或用 minimind data check 检查它"
            )
        self.args, self.model, self.config, self.recipe = args, model, model.config, recipe
        self.train_ds, self.val_ds, self.collate, self.extra_state = train_ds, val_ds, collate, extra_state
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.device = next(model.parameters()).device
        self.stat_dtype = torch.float32 if self.device.type in ("mps", "npu") else torch.float64
        self.tokenizer_hash = tokenizer_fingerprint(tokenizer) if tokenizer is not None else None
        self.weights = weights or checkpoint.weights_path(self.config, args.save_weight, args.save_dir)
        self.weights_of, self.lr_scales, self.probes = weights_of, lr_scales, probes
        self.other_files = dict(identity or {})
        self.state, self.metrics, self.train_loss = TrainState(), {}, math.nan
        self.evaluates, self.announced_total = evaluates, False
        # 卡上训练一步只有几十毫秒，取数要放到子进程里；CPU 上子进程只会抢算力
        self.num_workers = (
            (0 if self.device.type == "cpu" else 2) if args.num_workers is None else args.num_workers
        )
        self.byte_lengths = None if tokenizer is None else torch.from_numpy(token_byte_lengths(tokenizer))
        model.train()

        self._check_same_everywhere()
        saved = None
        if args.from_resume:  # 存档只在主进程的磁盘上有
            saved = distributed.broadcast_state(distributed.on_main(self._load), self.device)
        self._decide_numerics(saved or {}, compute_loss)
        self.scaler = device.make_scaler(self.device, self.dtype)
        if saved:
            self._restore(saved)
        self.vitals = VitalSigns(self.model, (saved or {}).get("vitals"))
        self.progress = Progress(args, len(train_ds), self.world_size, self.state)
        if saved:
            resuming.say_changes(saved, self)
        self.wrapped = self._wrap()
        self._open_log(saved)
        self._seed(saved)
        self.meter = Meter(eval_guess_steps=self._eval_guess())
        self.saved_step = self.state.step if saved else -1

    # ------------------------------------------------------------ 建立

    def _eval_guess(self) -> float:
        """还没验证过时，猜一次验证抵多少个训练步。"""
        if self.val_ds is None:  # 只有 on_eval：强化学习作答留出的题，与一步的采样相当
            return 1.0 if self.evaluates else 0.0
        rows = min(len(self.val_ds), self.args.val_max_rows or len(self.val_ds))
        # 验证只有前向，约为训练的三分之一
        return rows / (self.progress.global_batch * self.args.accumulation_steps) / 3

    def _load(self) -> dict[str, Any] | None:
        """读续训存档并核对：结构、决定结果的参数、各种文件的内容必须相同；只在主进程做。"""
        args = self.args
        path = checkpoint.resume_path(self.config, args.save_weight, args.checkpoint_dir)
        saved = checkpoint.lm_checkpoint(self.config, args.save_weight, save_dir=args.checkpoint_dir)
        if saved is None:
            say(f"没有续训存档 {path}，从头开始。")
            return None
        for key in ("config", "args", "identity", "progress", "rng", "total_steps"):
            if key not in saved:
                raise UserError(f"续训存档里没有 {key}", where=str(path), fix="去掉 --from_resume 重新训练")
        config = {k: v for k, v in checkpoint.config_dict(self.config).items() if k not in IGNORED_CONFIG}
        resuming.check_arguments(saved["args"], args, str(path))
        checkpoint.check_same_config(saved["config"], config, str(path), resuming.SAME)
        checkpoint.check_same_config(saved["identity"], self._identity(), str(path), resuming.SAME)
        return saved

    def _identity(self) -> dict[str, Any]:
        """结果所依赖的各种文件的身份：数据、分词器，配方另外用到的（教师、奖励）；只看内容。"""
        return {
            "配方": self.recipe,
            "训练行数": len(self.train_ds),
            "数据指纹": getattr(self.train_ds, "fingerprint", None),
            "行长": getattr(self.train_ds, "row_length", None),
            "分词器指纹": self.tokenizer_hash,
            **self.other_files,
        }

    def val_identity(self) -> str | int | None:
        """验证集的身份；换了它不影响训练，只是前后不能相比。"""
        return None if self.val_ds is None else getattr(self.val_ds, "fingerprint", len(self.val_ds))

    def _check_same_everywhere(self) -> None:
        """各机器各读各的数据文件：不是同一份，就会各训各的，或者步数不同而互相干等。

        Raises:
            UserError: 有进程的数据、分词器或模型与主进程的不同；指出是哪个进程。
        """
        mine = {**self._identity(), "模型": checkpoint.config_dict(self.config)}
        mine["验证集"] = self.val_identity()

        def check(everyone: list[dict[str, Any]]) -> None:
            for rank, other in enumerate(everyone):
                different = [key for key in mine if mine[key] != other[key]]
                if different:
                    what = "，".join(f"{key} {other[key]!r}（主进程 {mine[key]!r}）" for key in different)
                    raise UserError(
                        f"与主进程的不同：{what}",
                        where=f"进程 {rank}/{self.world_size}",
                        expected="每台机器上的数据文件、分词器与参数都相同",
                        fix="把同一份文件放到每台机器上，或用 --data_path、--val_path 明确指出",
                    )

        everyone = distributed.gather_objects(mine)
        distributed.on_main(lambda: check(everyone))

    def _decide_numerics(self, saved: dict[str, Any], compute_loss: Callable[..., Any]) -> None:
        """精度、优化器、峰值：要现场测的只由主进程测一次、所有进程照办，并写进存档供续训沿用。"""
        args, remembered = self.args, saved.get("numerics", {})
        if self.device.type == "cpu" and "threads" in remembered:
            device.reuse_threads(remembered["threads"], say)
        decided = None
        if distributed.is_main_process():
            if args.dtype == "auto" and remembered.get("device") == self.device.type:
                dtype = device.DTYPES[remembered["dtype"]]
            elif args.dtype == "auto" and not self.probes and self.device.type == "cpu":
                dtype = torch.float32
            else:
                dtype = device.choose_dtype(
                    args.dtype, self.device, lambda dtype: self._probe(compute_loss, dtype)
                )
            decided = {
                "device": self.device.type,
                "dtype": str(dtype).removeprefix("torch."),
                "peak_flops": device.peak_flops(self.device, dtype),
                "threads": fair_share().most,
            }
        self.numerics = distributed.broadcast_object(decided)
        self.dtype = device.DTYPES[self.numerics["dtype"]]
        for key, name in (("device", "设备"), ("dtype", "计算精度")):
            if key in remembered and remembered[key] != self.numerics[key]:
                say(f"注意：{name}由 {remembered[key]} 变为 {self.numerics[key]}，舍入随之不同。")
        self.optimizer = build_optimizer(
            self.model, args, newton_schulz_dtype=self.numerics["dtype"], lr_scales=self.lr_scales
        )

    def _probe(self, compute_loss: Callable[..., Any], dtype: torch.dtype) -> None:
        """用真模型、真数据的两行做一次前向反向，供 CPU 上比较 fp32 与 bf16。"""
        rows = [self.train_ds[i] for i in range(min(2, len(self.train_ds)))]
        with device.preserved_rng(self.device):
            with device.autocast_context(self.device, dtype):
                loss, count, _ = compute_loss(self.model, to_device(self.collate(rows), self.device))
            (loss / max(float(count), 1.0)).backward()
        self.model.zero_grad(set_to_none=True)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        # 存档里只取动量；各组的设置（学习率的倍数、迭代的精度）以现在的参数为准，该相同的前面已经核对过
        for group, option in zip(self.optimizer.param_groups, options):
            group.update(option)
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.state = TrainState(**saved["progress"])
        self.train_loss, self.metrics = saved["train_loss"], saved["metrics"]
        for name, part in self.extra_state.items():
            part.load_state_dict(saved["recipe_state"][name])
        say(
            f"读入续训存档：已完成 {self.state.step} 步（{self.state.epoch} 轮又 {self.state.samples} 个样本）。"
        )

    def _wrap(self) -> nn.Module:
        """compile 在里、DDP 在外；``self.model`` 始终是没包装的，存档的键名因此干净。"""
        wrapped = maybe_compile(self.model, self.args.use_compile, self)
        self.compiled = wrapped if isinstance(wrapped, CompiledBlocks) else None
        if not torch.distributed.is_initialized():
            return wrapped
        ids = [self.device.index] if self.device.type in ("cuda", "npu") else None
        return DistributedDataParallel(wrapped, device_ids=ids, gradient_as_bucket_view=True)

    def _open_log(self, saved: dict[str, Any] | None) -> None:
        args, folder, name = self.args, resolve_path(self.args.save_dir) / "logs", self.weights.stem
        self.log_path = folder / f"{name}.jsonl"
        tracker = "swanlab" if args.use_wandb and args.tracker == "none" else args.tracker

        def open_both() -> tuple[RunLog, Tracker]:
            config = {k: v for k, v in vars(args).items() if not k.startswith("_")}
            run_id = saved and saved["wandb_id"]
            return RunLog(self.log_path, self.state.step if saved else None), start_tracker(
                tracker,
                project=args.wandb_project,
                run_name=name,
                folder=folder,
                config=config,
                run_id=run_id,
            )

        self.log, self.tracker = distributed.on_main(open_both) or (None, None)

    def _seed(self, saved: dict[str, Any] | None) -> None:
        """最后才定随机数：前面的测速不影响它。各进程的 dropout 不同；进程数变了就按步数另起一条。"""
        if saved and saved["world_size"] == self.world_size:
            device.set_rng_state(saved["rng"][self.rank], self.device)
        else:
            device.seed_all(device.mix_seeds(self.args.seed, self.state.step, self.rank))

    def owes_evaluation(self) -> bool:
        """续训点该有一次验证而日志里没有：上次停在存盘与验证之间，要补上。"""
        step, interval = self.state.step, self.args.eval_interval
        due = step > 0 and (step == self.progress.total_steps or (interval and step % interval == 0))
        owed = due and self.evaluates and self.log and step not in self.log.evaluated_steps
        return distributed.broadcast_object(bool(owed))

    def flops_per_second(self, tokens_per_second: float, context: float) -> float | None:
        """模型口径的算力；``context`` 是词元平均所在段长，注意力的代价由它决定。"""
        if not isinstance(self.config, MiniMindConfig):
            return None
        return tokens_per_second * flops_per_token(self.config, context)

    # ------------------------------------------------------------ 存档

    def sidecar(self) -> dict[str, Any]:
        """权重旁边的 JSON：聊天、服务、导出与下一阶段靠它认尺寸。"""
        return {
            "config": checkpoint.config_dict(self.config),
            "tokenizer_hash": self.tokenizer_hash,
            "recipe": self.recipe,
            "step": self.state.step,
            "epoch": self.state.epoch,
            "metrics": {"train_loss": self.train_loss, **self.metrics},
            "options": resuming.public_options(self.args),
        }

    def snapshot(self) -> dict[str, Any]:
        """权重与优化器之外、这一刻的全部：进度、本进程的随机数、配方状态；都是拷贝，此后怎么走都不变。"""
        return {
            "step": self.state.step,
            "progress": asdict(self.state),
            "rng": device.rng_state(self.device),
            "vitals": self.vitals.state_dict(),
            "recipe_state": {name: part.state_dict() for name, part in self.extra_state.items()},
        }

    def save(self) -> None:
        """存权重与续训存档；多进程时只有主进程写，写不成则一起停。"""
        snapshot = self.snapshot()
        rng = distributed.gather_objects(snapshot["rng"])
        distributed.on_main(lambda: self.write(snapshot, rng))
        self.saved_step = self.state.step

    def write(self, snapshot: dict[str, Any], rng: list[dict[str, Any]]) -> None:
        """把此刻的权重、优化器与 ``snapshot`` 写盘；``rng`` 是各进程的随机数状态。"""
        args, progress = self.args, dict(snapshot["progress"])
        if args.keep_checkpoints > 1 and progress["step"] not in progress["kept"]:
            progress["kept"] = [*progress["kept"], progress["step"]]
        what = self.weights_of(self.model) if self.weights_of else self.model
        checkpoint.save_weights(what, self.weights, self.sidecar())
        checkpoint.lm_checkpoint(
            self.config,
            args.save_weight,
            model=self.model,
            optimizer=self.optimizer,
            epoch=progress["epoch"],
            step=progress["step"],
            wandb=self.tracker,
            save_dir=args.checkpoint_dir,
            scaler=self.scaler,
            progress=progress,
            rng=rng,
            numerics=self.numerics,
            identity=self._identity(),
            vitals=snapshot["vitals"],
            val_identity=self.val_identity(),
            args=resuming.options_of(args),
            lr_scales=dict(self.lr_scales or {}),
            total_steps=self.progress.total_steps,
            train_loss=self.train_loss,
            metrics=self.metrics,
            recipe_state=snapshot["recipe_state"],
        )
        if args.keep_checkpoints > 1:
            self.state.kept = history.keep_recent(self, progress["kept"])

    def record(self, **metrics: tuple[float, float]) -> None:
        """记下这一步的指标，供配方的 ``prepare`` 用：``run.record(reward=(和, 个数))``。

        各进程的和与个数分别相加，记录时是区间里的平均。每个进程都要调用，键与次序相同。
        """
        if not metrics:
            return
        values = torch.tensor([list(map(float, pair)) for pair in metrics.values()], dtype=self.stat_dtype)
        totals = distributed.all_reduce_sum(values.to(self.device)).tolist()
        interval = self.state.interval
        for name, pair in zip(metrics, totals):
            for part, value in zip(("sum", "count"), pair):
                interval[f"{name}/{part}"] = interval.get(f"{name}/{part}", 0.0) + value

    def write_log(self, record: dict[str, Any]) -> None:
        """主进程写一行 JSON；其中的数也交给记录工具。"""
        if self.log is not None:
            self.log.write(record)
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
            values = {k: v for k, v in numbers.items() if k != "step" and math.isfinite(v)}
            self.tracker.log(values, self.state.step)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc_info) -> None:
        """松开 DDP：它要在进程组解散之前析构，见 :func:`minimind.runtime.distributed.shutdown_distributed`。"""
        self.wrapped = None

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()

    def announce(self) -> None:
        """开始前的一段话：模型、数据、步数、精度、设备。"""
        args, peak = self.args, self.numerics["peak_flops"]
        row_length, documents = (getattr(self.train_ds, k, 0) for k in ("row_length", "num_documents"))
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        say(
            f"模型：{count_parameters(self.model) / 1e6:.2f}M 参数（训练 {trainable / 1e6:.2f}M），{self.weights.name}"
        )
        say(
            f"数据：{len(self.train_ds):,} "
            + (f"行 × {row_length} 词元，{documents:,} 篇文档" if row_length else "条")
            + (f"；验证 {len(self.val_ds):,} 行" if self.val_ds is not None else "")
        )
        rows = self.progress.global_batch * args.accumulation_steps
        say(
            f"训练：{args.epochs} 轮，共 {self.progress.total_steps:,} 步，每步 {rows} 行"
            f"（{args.batch_size} × {args.accumulation_steps} 累积 × {self.world_size} 进程），"
            f"{args.optimizer}，学习率 {args.learning_rate:g}，{args.schedule}"
        )
        say(
            f"设备：{device.device_name(self.device)}，精度 {self.numerics['dtype']}"
            + (f"，矩阵乘峰值 {peak / 1e12:.2f} TFLOPS" if peak else "")
        )
