"""蒸馏的两个模型：教师是哪个权重、学生多大、从哪里开始，没说的按现有的权重补上并说一声；``--on_policy`` 时学生自己作答的批。"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from minimind.arguments import check
from minimind.console import say
from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindLM, count_parameters
from minimind.objectives.logprobs import IGNORE
from minimind.paths import resolve_path
from minimind.rl.rollout import LocalRollout, response_batch
from minimind.runtime.checkpoint import config_dict, load_weights, read_sidecar, weights_path
from minimind.runtime.device import mix_seeds
from minimind.runtime.distributed import broadcast_object, rank
from minimind.runtime.weights import named_weights, read_weights
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint
from minimind.trainer.recipe import Run, Window
from minimind.trainer.setup import model_config
from minimind.trainer.train_args import TrainArguments

# 公共项目蒸馏的默认尺寸：教师 768 × 16，学生 512 × 8
TEACHER_SIZE, STUDENT_SIZE = (768, 16), (512, 8)
# 教师不比学生宽时，学生取教师的一半，但不小于这么多
SMALLEST_WIDTH, FEWEST_LAYERS = 64, 2


@dataclass(frozen=True)
class Teacher:
    """找到的教师：权重文件、结构、训练它的分词器的指纹（旧项目的权重没有旁注，不知道）。"""

    path: Path
    config: MiniMindConfig
    tokenizer_hash: str | None


def find_teachers(args: Any) -> list[Path]:
    """``{save_dir}/{from_teacher_weight}_*.pth`` 里合乎 ``--teacher_*`` 的，最大的在前。

    Raises:
        UserError: 一个也没有，附得到它的命令。
    """
    moe = None if args.teacher_use_moe is None else bool(args.teacher_use_moe)
    found = named_weights(args.from_teacher_weight, args.save_dir, args.teacher_hidden_size, moe)
    if not found:
        raise no_teacher(args, resolve_path(args.save_dir))
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def open_teacher(path: Path, layers: int | None) -> Teacher:
    """读出教师的结构；``layers`` 是命令行要求的层数。"""
    file = read_weights(path)
    if layers not in (None, file.config.num_hidden_layers):
        raise UserError(
            f"教师有 {file.config.num_hidden_layers} 层",
            where=str(path),
            expected=f"--teacher_num_layers {layers}",
            fix="改成与权重一致，或去掉这个参数",
        )
    return Teacher(path, file.config, file.sidecar.get("tokenizer_hash"))


def no_teacher(args: Any, folder: Path) -> UserError:
    width = args.teacher_hidden_size or TEACHER_SIZE[0]
    layers = args.teacher_num_layers or TEACHER_SIZE[1]
    size = f"--hidden_size {width} --num_hidden_layers {layers}" + " --use_moe 1" * bool(args.teacher_use_moe)
    others = sorted(path.name for path in folder.glob(f"{glob.escape(args.from_teacher_weight)}_*.pth"))
    return UserError(
        f"没有教师的权重 {args.from_teacher_weight}",
        where=str(folder),
        expected=f"{args.from_teacher_weight}_{width}{'_moe' * bool(args.teacher_use_moe)}.pth"
        + (f"；现有 {'、'.join(others)}，去掉 --teacher_* 就用其中最大的" if others else ""),
        fix=f"先训练它：python trainer/train_pretrain.py {size}，再 python trainer/train_full_sft.py {size}"
        "（不写尺寸即 512 × 8，也可以当教师，学生随之取一半）",
    )


def choose_models(args: Any) -> Teacher:
    """选出教师；补上没给的学生尺寸、起点与学习率：写进 ``args`` 的 ``hidden_size num_hidden_layers use_moe from_weight learning_rate``。

    Raises:
        UserError: 没有教师的权重，或补上的尺寸不合规矩。
    """
    paths = find_teachers(args)
    teacher = open_teacher(paths[0], args.teacher_num_layers)
    default = type(args).__dataclass_fields__
    given = {
        "hidden_size": args.student_hidden_size,
        "num_hidden_layers": args.student_num_layers,
        "use_moe": args.student_use_moe or None,
    }
    narrow = teacher.config.hidden_size <= STUDENT_SIZE[0]
    sizes = {
        "hidden_size": max(SMALLEST_WIDTH, teacher.config.hidden_size // 2) if narrow else STUDENT_SIZE[0],
        "num_hidden_layers": max(FEWEST_LAYERS, teacher.config.num_hidden_layers // 2)
        if narrow
        else STUDENT_SIZE[1],
    }
    asked = [f"--student_{'num_layers' if n == 'num_hidden_layers' else n}" for n, v in given.items() if v]
    if args.preset and asked:
        raise UserError(
            f"{'、'.join(asked)} 与 --preset {args.preset} 都在定学生的尺寸",
            where=asked[0],
            expected="学生的尺寸只由一边定",
            fix=f"去掉 --preset 或 {'、'.join(asked)}",
        )
    for name, value in given.items():
        # 通用的 --hidden_size 等说的也是学生，给了不同于默认值的就算数
        if value is not None:
            setattr(args, name, value)
        elif name in sizes and not args.preset and getattr(args, name) == default[name].default:
            setattr(args, name, sizes[name])
    if args.from_student_weight:
        args.from_weight = args.from_student_weight
    elif args.from_weight == "none":
        args.from_weight = next((w for w in ("full_sft", "pretrain") if same_size(args, w)), "none")
    if args.learning_rate is None:
        home = TrainArguments if args.from_weight == "none" else args  # 从头训练用预训练的
        args.learning_rate = home.LEARNING_RATE_TIMES_WIDTH / args.width
    check(args)
    # 学生若就从最大的那个权重开始，教师换下一个
    if teacher.path == weights_path(model_config(args), args.from_weight, args.save_dir) and len(paths) > 1:
        return open_teacher(paths[1], args.teacher_num_layers)
    return teacher


def same_size(args: Any, weight: str) -> bool:
    """``save_dir`` 里有没有与学生结构相同的这个权重；没有旁注的只看文件名里的尺寸。"""
    config = model_config(args, from_weight=weight)
    path = weights_path(config, weight, args.save_dir)
    saved = (read_sidecar(path) or {}).get("config", {}) if path.is_file() else {}
    current = config_dict(config)
    keys = ("arch", "num_hidden_layers", "num_attention_heads")
    return path.is_file() and all(saved.get(key, current[key]) == current[key] for key in keys)


def load_teacher(chosen: Teacher, args: Any, student: MiniMindConfig, device: torch.device) -> nn.Module:
    """教师模型，不求梯度；词表与分词器必须和学生的相同。各机器上有的权重可以不同，一律听主进程选的。

    Raises:
        UserError: 词表大小或分词器不同，或教师就是学生的起点本身。
    """
    teacher = broadcast_object(chosen)
    tokenizer = load_tokenizer(args.tokenizer_path)
    sizes = (teacher.config.vocab_size, student.vocab_size)
    if sizes[0] != sizes[1] or teacher.tokenizer_hash not in (None, tokenizer_fingerprint(tokenizer)):
        what = f"词表大小 {sizes[0]} 与 {sizes[1]}" if sizes[0] != sizes[1] else "词表一样大，但分词器不同"
        raise UserError(
            f"教师与学生的词表对不上（{what}）",
            where=str(teacher.path),
            expected="同一个分词器：教师对每个词的概率要逐词交给学生",
            fix="换一个用同一分词器训练的教师，或用 --tokenizer_path 指向教师的分词器、让学生从头训练",
        )
    if teacher.path == weights_path(student, args.from_weight, args.save_dir):
        raise UserError(
            "教师与学生是同一个权重，没有东西可学",
            where=str(teacher.path),
            fix="用 --student_hidden_size、--student_num_layers 给出更小的学生，或换一个教师",
        )
    if teacher.path == weights_path(student, args.save_weight, args.save_dir):
        raise UserError(
            "学生存盘时会改写教师的权重",
            where=str(teacher.path),
            expected="教师与学生的权重文件不同名",
            fix=f"换一个 --save_weight（现在是 {args.save_weight}）",
        )
    model = MiniMindLM(teacher.config)
    load_weights(model, teacher.path)
    say(
        f"教师 {teacher.path}：{count_parameters(model) / 1e6:.2f}M 参数，宽 {teacher.config.hidden_size}、"
        f"{teacher.config.num_hidden_layers} 层；学生宽 {student.hidden_size}、{student.num_hidden_layers} 层，"
        + ("从头训练。" if args.from_weight == "none" else f"从 {args.from_weight} 开始。")
    )
    return model.to(device).eval().requires_grad_(False)


def last_prompts(batch: dict[str, Any]) -> list[list[int]]:
    """打包行里每段对话最后一个回答之前的全部词元，即让学生自己作答的提示。"""
    ids, is_target = batch["input_ids"].flatten(), (batch["labels"] != IGNORE).flatten()
    prompts = []
    for begin, end in pairwise(batch["cu_seqlens"].tolist()):
        targets = is_target[begin:end]
        starts = (targets & ~targets.roll(1)).nonzero()  # 段的第一个词元从不是目标
        if len(starts):
            prompts.append(ids[begin : begin + int(starts[-1])].tolist())
    return prompts


def own_answers(
    run: Run, window: Window, *, share: float, seed: int, rollout: LocalRollout
) -> Iterator[Window]:
    """``--on_policy`` 时训练循环的 ``prepare``（GKD，arXiv 2306.13649）：有 ``share`` 的机会把一个微批次换成学生此刻自己的回答，批里记 ``on_policy``。

    由种子与步数决定，续训逐位一致。
    """
    replaced, own = [], 0
    for index, (ids, batch) in enumerate(window):
        own_seed = mix_seeds(seed, run.state.step, index, rank())
        prompts = last_prompts(batch) if Random(own_seed).random() < share else []
        if ids and prompts:
            answers = rollout.generate(prompts, 1, own_seed)
            batch = {**response_batch(answers, slice(None), run.data.train.pad_id), "on_policy": True}
            own += 1
        replaced.append((ids, batch))
    run.record(on_policy=(own, len(window)))
    yield replaced
