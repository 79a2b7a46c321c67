"""蒸馏：四分之一大的学生，数据不多时，有教师与没教师各训练一次，其余全同。

学生先预训练 800 步（各种子共用），再在 SFT 数据的前两千段上训练八轮；“有教师”是 α = 0，只学教师的概率表，“没教师”是 α = 1，
同样的数据、次序、步数与学习率。数据多而只过一遍时（一万段、120 步）两边差不多；数据少要反复看时，没教师的会背答案，
教师的概率表让它不那么武断。学生太弱（预训练 300 步、一千段六轮，只答对一成多）时，答对的差别淹没在种子的起伏里。
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bench_stages import Bench, Goal, Outcome

from minimind.evaluate.microworld import accuracy, evaluate_items
from minimind.recipes.distillation import DistillationArguments
from minimind.recipes.distillation import run as train_student
from minimind.recipes.pretrain import PretrainArguments
from minimind.recipes.pretrain import run as pretrain
from minimind.report.logs import read_log
from minimind.runtime.files import file_lock

TITLE = "蒸馏：四分之一大的学生"
GOALS = [
    Goal("ce_teacher", "有教师：留出对话的交叉熵", percent=False),
    Goal("ce_plain", "没教师：留出对话的交叉熵", percent=False),
    Goal("ce_gain", "交叉熵降了多少", at_least=0.0, percent=False),
    Goal("acc_teacher", "有教师：简单题答对"),
    Goal("acc_plain", "没教师：简单题答对"),
    Goal("acc_gain", "答对多了多少", at_least=0.0),
    Goal("size", "学生参数占教师"),
]
# 宽 96、4 层约 100 万参数，教师（tiny）360 万
STUDENT = {"hidden_size": 96, "num_hidden_layers": 4}
COMMON = {"max_seq_len": 256, "batch_size": 8, "log_interval": 10, "eval_interval": 0, "save_interval": 0}
PRETRAIN = {"max_steps": 800, "learning_rate": 1e-2, "schedule": "wsd", "decay_ratio": 0.7}
DISTILL = {"learning_rate": 3e-3, "epochs": 8, "alpha": 0.0, "temperature": 1.0}
DIALOGUES = 2000


def student_start(bench: Bench) -> Path:
    """预训练过的学生；训练过就直接用。"""
    folder = bench.work / "student"
    with file_lock(bench.work / "student.lock", lambda: None):  # 几个种子同时跑时只训练一次
        if (folder / "pretrain_96.pth").is_file():
            return folder
        pretrain(
            PretrainArguments(
                **STUDENT,
                **COMMON,
                **PRETRAIN,
                data_path=str(bench.world / "pretrain.jsonl"),
                val_path=str(bench.world / "pretrain_heldout.jsonl"),
                save_dir=str(folder),
                checkpoint_dir=str(folder / "checkpoints"),
                device=bench.args.device,
                dtype=bench.args.dtype,
            )
        )
    return folder


def settings(bench: Bench, seed: int, folder: Path, **changes: Any) -> DistillationArguments:
    """一个种子的设置。"""
    common = {k: v for k, v in bench.common(seed, folder, "sft").items() if k not in ("preset", "use_moe")}
    common |= COMMON
    lines = (bench.world / "sft.jsonl").read_text("utf-8").splitlines(keepends=True)
    data = folder / "few.jsonl"
    data.write_text("".join(lines[:DIALOGUES]), "utf-8")
    common["data_path"] = str(data)
    common |= {
        "student_hidden_size": STUDENT["hidden_size"],
        "student_num_layers": STUDENT["num_hidden_layers"],
    }
    return DistillationArguments(**{**common, "from_student_weight": "pretrain", **DISTILL, **changes})


def run(bench: Bench, seed: int) -> Outcome:
    """有教师与没教师各训练一次。"""
    start, metrics, curves = student_start(bench), {}, {}
    for name, changes in (("teacher", {}), ("plain", {"alpha": 1.0})):
        folder = bench.folder(seed, name)
        for suffix in ("pth", "json"):
            shutil.copy(start / f"pretrain_96.{suffix}", folder)
        result = train_student(settings(bench, seed, folder, **changes))
        loaded = bench.open(folder, "full_dist")
        answered = evaluate_items(loaded.model, loaded.tokenizer, bench.items("easy"), description="各任务")
        metrics |= {f"ce_{name}": result.metrics["val_ce"], f"acc_{name}": accuracy(answered)}
        rows = [row for row in read_log(result.log) if "lr" in row]
        curves[f"ce_{name}"] = [[row["step"], round(row["ce"], 4)] for row in rows]
    metrics["ce_gain"] = metrics["ce_plain"] - metrics["ce_teacher"]
    metrics["acc_gain"] = metrics["acc_teacher"] - metrics["acc_plain"]
    sizes = [
        sum(p.numel() for p in bench.open(f, w).model.parameters())
        for f, w in ((folder, "full_dist"), (bench.base, "full_sft"))
    ]
    metrics["size"] = sizes[0] / sizes[1]
    return Outcome(metrics, curves, notes={"student": STUDENT, "pretrain": PRETRAIN, "settings": DISTILL})
