"""LoRA 微调：底座一位不动，只学一个几十分之一大的增量。

每个选中的线性层 y = W·x 换成::

    y = W·x + (alpha / r) · B·(A·x)，   A [r, in]，B [out, r]

只有 A、B 受训练并保存。A 随机、B 为零，所以第 0 步的模型就是底座。目标与监督微调相同：助手的词元上的交叉熵。
训练完得到 ``out/lora/{lora_name}_{hidden_size}[_moe].pth``，可以随时叠加、合并或去掉，底座只存一份。

来源：Hu et al. 2021（LoRA，arXiv 2106.09685，式 3）。结构在 :mod:`minimind.model.model_lora`。
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from minimind.arguments import arg, override
from minimind.console import say
from minimind.dataset import SFTDataset, collate_packed
from minimind.errors import UserError
from minimind.model.model_lora import apply_lora, lora_state_dict
from minimind.paths import resolve_path
from minimind.ranges import MANY
from minimind.recipes.entry import entry, open_datasets, open_model
from minimind.runtime.adapters import adapter_path, base_fingerprint
from minimind.trainer.loop import TrainResult, train
from minimind.trainer.recipe import Recipe, language_model_loss
from minimind.trainer.train_args import TrainArguments


@dataclass
class LoRAArguments(TrainArguments, group="LoRA"):
    """LoRA 微调：只训练低秩增量，换身份、换口吻、补一个领域。"""

    lora_name: str = arg(
        "lora_identity",
        "LoRA 的名字，写到 {save_dir}/lora/{lora_name}_{hidden_size}[_moe].pth",
        text="name",
        resume="harmless",
    )
    lora_rank: int = arg(8, "秩 r：增量的自由度，越大能改得越多、文件越大", low=1, high=16384)
    lora_alpha: float = arg(16.0, "缩放：增量乘 alpha / r", above=0, high=MANY)
    lora_targets: str = arg(
        "all",
        "加在哪些层上：all 注意力与前馈的全部线性层（含各专家），square 只要方阵（q_proj、o_proj，公共项目的选法），"
        "或逗号分隔的层名，如 q_proj,v_proj",
        text="filled",
    )
    save_weight: str | None = override(
        TrainArguments,
        "save_weight",
        None,
        help="同 --lora_name（各训练命令都有的参数）；不给则用 --lora_name",
    )
    from_weight: str = override(TrainArguments, "from_weight", "full_sft")
    epochs: int = override(TrainArguments, "epochs", 50)
    optimizer: str = override(TrainArguments, "optimizer", "adamw")
    weight_decay: float = override(TrainArguments, "weight_decay", 0.0)

    # 微世界里换身份（155 步）：0.2 时新身份答对 97 %、其他任务掉 1 个百分点，0.5 时 100 % 与 2 个，0.3 时 98 % 与 1 个
    LEARNING_RATE_TIMES_WIDTH = 0.3

    def __post_init__(self):
        super().__post_init__()
        # 权重、续训存档与日志都用这个名字
        self.lora_name = self.save_weight = self.save_weight or self.lora_name


def add_lora(model: nn.Module, args: LoRAArguments) -> None:
    """按参数加上 LoRA、冻结底座；设置写进模型的配置，随旁注与续训存档走，续训时据此核对。"""
    base = {"weight": args.from_weight, "fingerprint": base_fingerprint(model)}
    try:
        modules = apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets)
    except ValueError as error:
        raise UserError(str(error), where="--lora_rank、--lora_targets") from error
    model.config.lora = {
        "rank": args.lora_rank,
        "alpha": args.lora_alpha,
        "targets": args.lora_targets,
        "base": base,
    }
    trained = sum(value.numel() for value in lora_state_dict(model).values())
    total = sum(p.numel() for p in model.parameters()) - trained
    say(
        f"LoRA：秩 {args.lora_rank}，alpha {args.lora_alpha:g}，加在 {len(modules)} 层上，"
        f"{trained:,} 个参数，是底座的 {trained / total:.1%}。"
    )


def run(args: LoRAArguments) -> TrainResult:
    """按参数训练一次；返回 LoRA 权重的位置与最后的指标。"""
    model, tokenizer = open_model(args)
    add_lora(model, args)
    own = f"dataset/{args.lora_name}.jsonl"
    if not args.data_path and resolve_path(own).is_file():
        say(f"没有给 --data_path，用 {own}。")
        args.data_path = own
    data = open_datasets(SFTDataset, args, tokenizer, "lora_identity")
    recipe = Recipe(
        "lora",
        language_model_loss,
        collate_packed,
        weights=adapter_path(model.config, args.lora_name, args.save_dir),
        weights_of=lora_state_dict,
    )
    return train(args, recipe, model, tokenizer, data)


main = entry(LoRAArguments, run)
