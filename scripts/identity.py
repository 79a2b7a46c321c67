"""重构前后逐位相同：用固定种子把每个配方训练几步，记下权重、续训存档与日志的指纹，再与从前的比。

python scripts/identity.py --write before.json      # 动手之前
python scripts/identity.py --compare before.json    # 每次提交之前；有不同就列出来，退出码 1

只在同一台机器、同样的 torch 上可比：浮点求和的次序随机器而变。
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # 机器忙时线程数会变，求和的次序随之改变

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "recipes"))
from minimind.errors import UserError, guard

VARIANTS = {"": {}, "_moe": {"use_moe": 1}, "_v3": {"arch": "v3"}}


def digest(value: object, into=None) -> str:
    """嵌套的字典、列表与张量的指纹：键、形状、精度、每一位。"""
    h = into or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        h.update(f"{value.dtype}{tuple(value.shape)}".encode())
        h.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            h.update(str(key).encode())
            digest(value[key], h)
    elif isinstance(value, list | tuple):
        for item in value:
            digest(item, h)
    else:
        h.update(repr(value).encode())
    return h.hexdigest()[:16]


def record(folder: Path) -> dict[str, dict[str, str]]:
    """十个配方（预训练另加混合专家与 v3 两种结构）各训练几步，返回 ``{名字: {什么: 指纹}}``。"""
    from recipe_cases import CASES, log_lines, make_base, make_world, run_recipe, saved, weights_file

    world = folder / "world"
    world.mkdir()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_world(world)
    found = {}
    for name, case in CASES.items():
        for variant, flags in VARIANTS.items() if name == "pretrain" else [("", {})]:
            home = folder / f"{name}{variant}"
            home.mkdir()
            for weight in ("full_sft", "teacher"):
                make_base(home, weight)
            quiet = io.StringIO()
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                run_recipe(case, home, case.argv(world, **flags))
            suffix = "_moe" if "moe" in variant else ""
            state = saved(home, case, suffix)
            found[f"{name}{variant}"] = {
                "权重": digest(torch.load(weights_file(home, case, suffix), weights_only=True)),
                "存档里的模型": digest(state["model"]),
                "优化器": digest(state["optimizer"]),
                "随机数": digest(state["rng"]),
                "日志": digest(log_lines(home, case, suffix)),
            }
            print(f"{name}{variant}：{found[f'{name}{variant}']}", file=sys.stderr)
    return found


@guard
def main() -> int:
    """命令行入口。"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--write", type=Path, help="把指纹写进这个文件")
    which.add_argument("--compare", type=Path, help="与这个文件里的指纹相比")
    args = parser.parse_args()
    wanted = None
    if args.compare:
        try:
            wanted = json.loads(args.compare.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"读不出从前的指纹：{error}", where=str(args.compare)) from error
    target = (args.write or args.compare).resolve()
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder))
        os.chdir(here)  # 配方在各自的目录里运行
    if args.write:
        target.write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", "utf-8")
        return 0
    different = [
        f"{name} 的{what}：{wanted[name].get(what)} → {mark}"
        for name, marks in found.items()
        if name in wanted  # 从前没有的配方没有可比的
        for what, mark in marks.items()
        if wanted[name].get(what) != mark
    ]
    missing = [f"{name}：从前有，现在没有" for name in wanted if name not in found]
    print("\n".join(different + missing) or f"{len(found)} 次训练的权重、存档与日志逐位相同。")
    return 1 if different or missing else 0


if __name__ == "__main__":
    sys.exit(main())
