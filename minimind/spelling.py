"""写错或别处叫法的参数、取值：找出最像的那个。"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# 别的框架的叫法 → 本项目的，先到先得（命令里有哪个就用哪个）
FLAG_ALIASES: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate", "pretrain_lr"),
    "max_lr": ("learning_rate",),
    "bs": ("batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "micro_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulation_steps",),
    "grad_accum": ("accumulation_steps",),
    "num_train_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "steps": ("max_steps",),
    "max_iters": ("max_steps",),
    "dim": ("hidden_size",),
    "d_model": ("hidden_size",),
    "hidden_dim": ("hidden_size",),
    "n_embd": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "n_layer": ("num_hidden_layers",),
    "n_layers": ("num_hidden_layers",),
    "num_layers": ("num_hidden_layers",),
    "moe": ("use_moe",),
    "max_length": ("max_seq_len", "max_new_tokens"),
    "max_seq_length": ("max_seq_len",),
    "seq_len": ("max_seq_len",),
    "block_size": ("max_seq_len",),
    "context_length": ("max_seq_len", "num_ctx", "max_length"),
    "max_tokens": ("max_new_tokens", "max_gen_len", "max_length"),
    "max_completion_length": ("max_gen_len",),
    "max_model_len": ("max_length",),
    "output_dir": ("out_dir", "save_dir"),
    "out_dir": ("save_dir",),
    "ckpt_dir": ("checkpoint_dir", "save_dir"),
    "checkpoint": ("from_weight", "weight"),
    "model": ("weight", "from_weight", "load_from"),
    "model_path": ("load_from", "from_weight"),
    "model_mode": ("weight",),
    "model_name_or_path": ("load_from", "from_weight"),
    "init_from": ("from_weight",),
    "data": ("data_path",),
    "dataset": ("data_path",),
    "train_file": ("data_path",),
    "val_file": ("val_path",),
    "eval_data": ("val_path",),
    "tokenizer": ("tokenizer_path",),
    "resume": ("from_resume",),
    "resume_from_checkpoint": ("from_resume",),
    "compile": ("use_compile",),
    "wandb": ("use_wandb",),
    "precision": ("dtype",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "wd": ("weight_decay",),
    "warmup": ("warmup_ratio",),
    "warmup_steps": ("warmup_ratio",),
    "lr_scheduler_type": ("schedule",),
    "max_grad_norm": ("grad_clip",),
    "clip_grad": ("grad_clip",),
    "momentum": ("muon_momentum",),
    "workers": ("num_workers",),
    "save_steps": ("save_interval",),
    "eval_steps": ("eval_interval",),
    "logging_steps": ("log_interval",),
    "r": ("lora_rank",),
    "rank": ("lora_rank",),
    "group_size": ("num_generations",),
    "kl": ("kl_coef", "beta"),
    "clip_range": ("clip_epsilon", "epsilon"),
    "max_history": ("historys",),
    "history_cnt": ("historys",),
    "top_n": ("top_k",),
    "quant": ("quantize", "type"),
}


def suggest_flag(name: str, known: Sequence[str]) -> str | None:
    """``known``（不带横线的参数名）里最像 ``name`` 的一个；都不像返回 None。"""
    name = name.replace("-", "_").lower()
    names = list(dict.fromkeys(option.replace("-", "_") for option in known))
    if name in names:  # 只是横线写错
        return name
    for alias in FLAG_ALIASES.get(name, ()):
        if alias in names:
            return alias
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    # 少写了一截：--weight_name、--seq
    close = close or [option for option in names if len(name) > 2 and (name in option or option in name)]
    return close[0] if close else None


def suggest_choice(value: str, choices: Sequence[str]) -> str | None:
    """最像的取值；大小写不同的直接认出。"""
    lowered = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(value.strip().lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[close[0]] if close else None
