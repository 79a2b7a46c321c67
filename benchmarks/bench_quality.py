"""到达同样质量要多久：同一结构、同一数据、同一台机器上比较优化配方。

一条命令::

    python benchmarks/bench_quality.py                 # 探针：5M 参数，220 步 × 8192 词元
    python benchmarks/bench_quality.py --long 1        # 长预算：1100 步

每种配方、每个种子各训练一次，训练用时不含验证。目标有两个：公开默认配方（AdamW 5e-4，余弦）训练结束时的验证
bits per byte，和一小组 AdamW（三个学习率，带预热）里最好的那个结束时的。表里是各配方在自己的曲线上（相邻两次验证
之间线性插值）首次到达目标所用的训练时间，以及与目标主人全程用时之比。

每次训练结束都写一份曲线 JSON；中断后重跑同一条命令，已有的不再训练。
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import SHARED, clock_for, environment, need_file, write_result
from quality_table import show, summarize, thin

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.dataset import PretrainDataset, collate_packed
from minimind.dataset.collate import to_device
from minimind.errors import UserError, guard
from minimind.model import MiniMindConfig, MiniMindForCausalLM, count_parameters
from minimind.runtime.device import DTYPES, autocast_context, resolve_device, seed_all, synchronize
from minimind.runtime.files import write_text
from minimind.tokenizer import load_tokenizer, token_byte_lengths, tokenizer_fingerprint
from minimind.trainer.loader import training_batches
from minimind.trainer.optim import build_optimizer, set_learning_rate
from minimind.trainer.progress import lr_at
from minimind.trainer.recipe import count_targets, language_model_loss
from minimind.trainer.train_args import TrainArguments
from minimind.trainer.trainer_utils import model_config
from minimind.trainer.validation import validate

MICRO_ROWS = 16  # 一次前向的行数：整批一次做与分两次做，CPU 上一样快，内存减半


@dataclass
class QualityArguments:
    """到达同样质量要多久：公开默认配方、AdamW 小网格与本项目默认配方。"""

    long: int = arg(0, "1 为长预算：5 倍步数、hidden 192 × 4 层，给出的 steps、hidden_size 等优先", (0, 1))
    steps: int | None = arg(None, "预算：优化步数；不给则探针 220，长预算 1100")
    hidden_size: int | None = arg(None, "隐层宽度；不给则探针 256，长预算 192")
    num_hidden_layers: int | None = arg(None, "层数；不给则探针 6，长预算 4")
    num_attention_heads: int = arg(8, "注意力头数")
    batch_size: int = arg(32, "每步行数")
    max_seq_len: int = arg(256, "每行词元数")
    seeds: int = arg(3, "种子个数")
    recipes: str = arg("public,adamw_1e-3,adamw_2e-3,adamw_4e-3,ours", "要跑的配方，逗号分隔")
    eval_points: int = arg(40, "一次训练里验证多少次")
    eval_rows: int = arg(96, "验证用多少行（固定的随机子集）")
    data_path: str = arg(str(SHARED / "pretrain_zh.jsonl"), "训练数据")
    val_path: str = arg(str(SHARED / "heldout/pretrain_zh.heldout.jsonl"), "验证数据")
    cache_dir: str = arg("out/bench_quality/cache", "分词缓存的目录")
    run_dir: str = arg("out/bench_quality/runs", "每次训练的曲线 JSON 的目录；续跑靠它")
    device: str = arg("auto", "设备")
    dtype: str = arg("bfloat16", "计算精度；各配方相同", tuple(DTYPES))
    threads: int = arg(0, "CPU 线程数；0 表示按环境")
    rerun: int = arg(0, "1 表示不用已有的曲线，全部重训", (0, 1))
    name: str = arg("", "结果文件名的后缀")

    def resolved(self) -> QualityArguments:
        """填上随 ``--long`` 而变的默认值。"""
        defaults = (1100, 192, 4) if self.long else (220, 256, 6)
        for key, value in zip(("steps", "hidden_size", "num_hidden_layers"), defaults):
            if getattr(self, key) is None:
                setattr(self, key, value)
        return self


@dataclass
class Recipe:
    """一种优化配方。

    overrides: 对 :class:`TrainArguments` 默认值的修改；空表示就是项目的默认配方。
    plain_adamw: 用 ``torch.optim.AdamW(model.parameters(), lr)``，不分组——公开项目的写法。
    config: 对模型配置的修改（只允许影响初始化的项）。
    budget: 用预算的几分之几；日程按缩短后的步数走完。
    """

    title: str
    overrides: dict[str, Any] = field(default_factory=dict)
    plain_adamw: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    budget: float = 1.0


# 对照用普通的正态初始化（标准差 0.02），公开项目的默认
PLAIN_INIT: dict[str, Any] = {"zero_init_residual": False}


def adamw(lr: float) -> Recipe:
    """AdamW 的好写法：预热 5 %、余弦到一成、beta2 0.95、矩阵权重衰减 0.1。"""
    overrides = dict(
        optimizer="adamw", learning_rate=lr, schedule="cosine", warmup_ratio=0.05, embed_lr_scale=1.0,
        weight_decay=0.1, adam_beta2=0.95,
    )  # fmt: skip
    return Recipe(f"AdamW {lr:g}，预热 + 余弦", overrides, config=PLAIN_INIT)


RECIPES: dict[str, Recipe] = {
    "public": Recipe(
        "公开默认：AdamW 5e-4，余弦",
        dict(optimizer="adamw", learning_rate=5e-4, schedule="cosine", warmup_ratio=0.0),
        plain_adamw=True,
        config=PLAIN_INIT,
    ),
    "adamw_1e-3": adamw(1e-3),
    "adamw_2e-3": adamw(2e-3),
    "adamw_4e-3": adamw(4e-3),
    "adamw_8e-3": adamw(8e-3),
    "ours": Recipe("本项目默认"),
    "ours_quarter": Recipe("本项目默认，四分之一预算", budget=0.25),
    "ours_half": Recipe("本项目默认，一半预算", budget=0.5),
}


def recipe_config(args: QualityArguments, recipe: Recipe, vocab_size: int) -> MiniMindConfig:
    """各配方结构相同，只有初始化可以不同；不改就是项目从头训练的默认初始化。"""
    sizes = TrainArguments(hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers)
    return model_config(
        sizes, num_attention_heads=args.num_attention_heads, vocab_size=vocab_size, **recipe.config
    )


def run_key(args: QualityArguments, recipe: Recipe, seed: int, fingerprint: str) -> str:
    """一次训练的身份：凡影响结果的都算进去，改了任何一项就会重训。"""
    train_args = TrainArguments(hidden_size=args.hidden_size, **recipe.overrides)
    parts = {
        "recipe": asdict(recipe),
        "train": {k: v for k, v in asdict(train_args).items() if k in TRAIN_FIELDS},
        "init": recipe_config(args, recipe, 6400).to_dict(),
        "seed": seed,
        "data": fingerprint,
        "args": {k: getattr(args, k) for k in RUN_FIELDS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


TRAIN_FIELDS = (
    "optimizer", "learning_rate", "embed_lr_scale", "weight_decay", "muon_momentum", "adam_beta2", "schedule",
    "warmup_ratio", "decay_ratio", "grad_clip",
)  # fmt: skip
RUN_FIELDS = (
    "steps", "hidden_size", "num_hidden_layers", "num_attention_heads", "batch_size", "max_seq_len",
    "eval_points", "eval_rows", "device", "dtype", "threads",
)  # fmt: skip


def train_once(
    args: QualityArguments, recipe: Recipe, seed: int, train_ds: Any, val_ds: Any, tokenizer: Any
) -> dict[str, Any]:
    """训练一次，返回曲线 ``[{step, tokens, seconds, train_loss, val_loss, val_bpb}]``；``seconds`` 只算训练。

    单线程 CPU 上 ``seconds`` 取处理器时间：别的进程抢占不算在内；曲线里记着用的哪个时钟。
    """
    device, dtype = resolve_device(args.device), DTYPES[args.dtype]
    clock = clock_for(device)
    train_args = TrainArguments(hidden_size=args.hidden_size, **recipe.overrides)
    seed_all(seed)
    model = MiniMindForCausalLM(recipe_config(args, recipe, len(tokenizer))).to(device).train()
    if recipe.plain_adamw:
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=train_args.learning_rate)
    else:
        optimizer = build_optimizer(model, train_args)
    byte_lengths = torch.from_numpy(token_byte_lengths(tokenizer))
    steps = max(1, round(args.steps * recipe.budget))
    micro_rows = min(MICRO_ROWS, args.batch_size)
    batches = training_batches(
        train_ds, collate_packed, seed=seed, epochs=10**6, batch_size=micro_rows, device=device, num_workers=0
    )  # fmt: skip
    every = max(1, args.steps // args.eval_points)
    curve: list[dict[str, float]] = []
    seconds, tokens = 0.0, 0

    def evaluate(step: int, train_loss: float) -> None:
        scores = validate(
            model, val_ds, language_model_loss, collate_packed, batch_size=MICRO_ROWS, device=device, dtype=dtype,
            byte_lengths=byte_lengths, max_rows=args.eval_rows,
        )  # fmt: skip
        curve.append(dict(step=step, tokens=tokens, seconds=seconds, train_loss=train_loss, **scores))

    for step in range(steps):
        start = clock()
        window = [next(batches)[1] for _ in range(args.batch_size // micro_rows)]
        total = sum(count_targets(batch) for batch in window)
        lr = lr_at(
            step + 0.5, steps, peak=train_args.learning_rate, schedule=train_args.schedule,
            warmup_ratio=train_args.warmup_ratio, decay_ratio=train_args.decay_ratio,
        )  # fmt: skip
        set_learning_rate(optimizer, lr)
        loss_value = 0.0
        for batch in window:
            with autocast_context(device, dtype):
                loss_sum, _ = language_model_loss(model, to_device(batch, device))
            (loss_sum / total).backward()
            loss_value += float(loss_sum.detach()) / total
        torch.nn.utils.clip_grad_norm_(model.parameters(), train_args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds += clock() - start
        tokens += int(total)
        if (step + 1) % every == 0 or step + 1 == steps:
            evaluate(step + 1, loss_value)
    return {
        "recipe": recipe.title, "seed": seed, "steps": steps, "seconds": seconds, "parameters": count_parameters(model),
        "tokens": tokens, "curve": curve, "clock": clock.__name__, "environment": environment(device),
    }  # fmt: skip


@guard
def main(argv: list[str] | None = None) -> int:
    args = parse_args(QualityArguments, argv, prog="bench_quality").resolved()
    names = [name.strip() for name in args.recipes.split(",") if name.strip()]
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise UserError(f"不认识的配方 {'、'.join(unknown)}", where="--recipes", expected="、".join(RECIPES))
    if args.threads:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    if args.batch_size % min(MICRO_ROWS, args.batch_size):
        raise UserError(f"--batch_size {args.batch_size} 不是 {MICRO_ROWS} 的倍数")
    tokenizer = load_tokenizer()
    datasets = [
        PretrainDataset(
            str(need_file(path)), tokenizer, args.max_seq_len, split="all", cache_dir=args.cache_dir
        )
        for path in (args.data_path, args.val_path)
    ]
    fingerprint = f"{tokenizer_fingerprint(tokenizer)[:16]}-{len(datasets[0])}-{len(datasets[1])}"
    run_dir = Path(args.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    # 种子在外、配方在内：机器忙闲的起伏由各配方平摊，中断时各配方的种子数也相同
    for seed in range(args.seeds):
        for name in names:
            path = run_dir / f"{name}-s{seed}-{run_key(args, RECIPES[name], seed, fingerprint)}.json"
            if not path.exists() or args.rerun:
                record = train_once(args, RECIPES[name], seed, *datasets, tokenizer)
                write_text(path, json.dumps(record, ensure_ascii=False))
            record = json.loads(path.read_text(encoding="utf-8"))
            runs[name].append(record)
            say(
                f"{name} 种子 {seed}：终点 {record['curve'][-1]['val_bpb']:.4f} bpb，训练 {record['seconds']:.0f} 秒"
            )
    summary = summarize(runs)
    parameters = next(iter(runs.values()))[0]["parameters"]
    show(args, summary, parameters)
    result = {"arguments": asdict(args), "parameters": parameters, **summary, "curves": thin(runs)}
    default_name = "quality-long" if args.long else "quality"
    path = write_result(
        default_name + (f"-{args.name}" if args.name else ""), resolve_device(args.device), result
    )
    say(f"结果写入 {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
