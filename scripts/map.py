"""房子的地图：从 import 语句数出每个房间的文件与行数、谁引用谁，画进 docs/training.md。

make map                            # 打印数字，更新 docs/training.md 里的图
python scripts/map.py --check       # 只看图是不是最新的、有没有往上引用与循环；有问题退出码 1
python scripts/map.py --time 1      # 另量导入配方要多久（处理器时间，三次取中间）
python scripts/map.py --root 旧的目录 --json before.json    # 数另一份源码，比较前后

数的是什么（怎么数在 scripts/source_imports.py）：

- 引用分三种：载入时（模块顶层）、用到时（函数里面）、只为类型（``if TYPE_CHECKING``）。闭包只沿第一种走，与
  ``sys.modules`` 里看到的一致。循环算第一、三两种，靠“用到时”才合上的另列；往上的引用三种都不许有。
- 参数路过的地方：从配方的 ``run(args)`` 出发，按源码次序跟着调用往里走（用到才载入的也算），每个函数只进一次。读 ``args.什么``、
  ``self.args.什么``，或把它们交给别人的函数算一处；换到一个早先到过的文件算一次折返。
- 必读：想知道一次预训练从命令到更新权重怎么走，从上往下打开的那些文件，整个文件的行数都算（:data:`MUST_READ`）。
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from source_imports import (
    FOR_TYPES,
    GROUND,
    LAYERS,
    ON_LOAD,
    ON_USE,
    Journey,
    Module,
    circles,
    closure,
    read_modules,
    same_names,
    upward,
)

from minimind.errors import UserError, guard

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/training.md")
BEGIN, END = "<!-- 房间图：开始（make map 写的，不要手改） -->", "<!-- 房间图：结束 -->"
OPENED = (
    "minimind.recipes.pretrain",
    "minimind.recipes.grpo",
    "minimind.inference.engine",
    "minimind.serve.app",
)
RECIPES = ("minimind.recipes.pretrain", "minimind.recipes.grpo")
# 次序就是读的次序：命令，配方，入口与数据，一行数据怎么拼，循环，循环看得到的，开场，取数，走到哪里，一步，优化器，模型
MUST_READ = (
    "trainer_commands.train_pretrain",
    "minimind.recipes.pretrain",
    "minimind.recipes.entry",
    "minimind.dataset.packed",
    "minimind.trainer.loop",
    "minimind.trainer.recipe",
    "minimind.trainer.setup",
    "minimind.trainer.loader",
    "minimind.trainer.progress",
    "minimind.trainer.step",
    "minimind.trainer.optim",
    "minimind.model.model_minimind",
)


def room_imports(modules: dict[str, Module]) -> dict[str, dict[str, str]]:
    """房间之间的引用 ``{房间: {房间: 最早的一种}}``，不含地基与仓库里的命令。"""
    rooms: dict[str, dict[str, str]] = {}
    for module in modules.values():
        if not module.name.startswith("minimind"):
            continue
        mine = rooms.setdefault(module.room, {})
        for target, kind in module.imports.items():
            room = modules[target].room
            if room not in (module.room, GROUND):
                mine[room] = min((kind, mine.get(room, kind)), key=(ON_LOAD, ON_USE, FOR_TYPES).index)
    rooms.pop(GROUND, None)
    return rooms


def label(modules: dict[str, Module], room: str) -> str:
    """房间在磁盘上的名字：``rl/`` 或 ``cli.py``。"""
    return f"{room}/" if modules[f"minimind.{room}"].path.name == "__init__.py" else f"{room}.py"


def draw(modules: dict[str, Module]) -> str:
    """房间图（mermaid）与一张全表。图里省去能由别的箭头推出的引用，表里一条不少。"""
    rooms = room_imports(modules)
    shown = [
        (layer, [room for room in names if room in rooms and room not in ("__main__", "launch")])
        for layer, names in LAYERS.items()
    ]
    lines = [BEGIN, "", "```mermaid", "flowchart TD"]
    for i, (layer, names) in enumerate(shown):
        if names:
            lines += [
                f'  subgraph L{i}["{layer}"]',
                *(f'    {name}["{label(modules, name)}"]' for name in names),
                "  end",
            ]

    def below(room: str) -> set[str]:
        reached, waiting = set(), [room]
        while waiting:
            fresh = set(rooms.get(waiting.pop(), {})) - reached
            reached |= fresh
            waiting.extend(fresh)
        return reached

    kept = [room for _, names in shown for room in names]
    reach = {room: below(room) for room in kept}
    for room in kept:
        for target in sorted(rooms[room], key=kept.index):
            if not any(target in reach[other] and other not in reach[target] for other in rooms[room]):
                lines.append(f"  {room} --> {target}")
    lines += ["```", "", "| 房间 | 里面是什么 | 引用 |", "|---|---|---|"]
    for room in kept:
        module = modules[f"minimind.{room}"]
        what = (ast.get_docstring(module.tree) or "").split("\n")[0].split("。")[0].replace("``", "`")
        targets = [
            f"{target}（用到时）" if rooms[room][target] == ON_USE else target
            for target in sorted(rooms[room], key=kept.index)
        ]
        name = label(modules, room)
        lines.append(f"| [`{name}`](../minimind/{name}) | {what} | {'、'.join(targets) or '—'} |")
    return "\n".join([*lines, "", END])


def page_with(drawn: str, page: str) -> str:
    """把图放进页面里两个记号之间。"""
    if BEGIN not in page or END not in page:
        raise UserError("找不到放图的记号", where=str(PAGE), expected=f"{BEGIN} 与 {END}")
    return page[: page.index(BEGIN)] + drawn + page[page.index(END) + len(END) :]


def figures(modules: dict[str, Module]) -> dict[str, object]:
    """前后比较用的全部数字。"""
    ours = [module for module in modules.values() if module.name.startswith("minimind")]
    rooms: dict[str, list[int]] = {}
    for module in ours:
        rooms.setdefault(module.room, []).append(module.lines)
    full = [module.lines for module in ours if module.path.name != "__init__.py"]
    return {
        "文件": len(ours),
        "行": sum(module.lines for module in ours),
        "每个文件的行数，中位": statistics.median(full),
        "40 行以下的文件": sum(lines < 40 for lines in full),
        "房间": {room: (len(lines), sum(lines)) for room, lines in sorted(rooms.items())},
        "闭包": {
            name: (len(files), sum(module.lines for module in files))
            for name in OPENED
            if name in modules
            for files in [closure(name, modules)]
        },
        "必读": (len(MUST_READ), sum(modules[name].lines for name in MUST_READ))
        if all(name in modules for name in MUST_READ)
        else None,  # 旧的目录里还不叫这些名字
        "循环": len(circles(modules)),
        "用到时才合上的循环": [
            group for group in circles(modules, (ON_LOAD, ON_USE)) if group not in circles(modules)
        ],
        "往上的引用": len(upward(modules)),
        "同名的公开类": len(same_names(modules)),
        "参数路过": {
            name: (len(journey.places), journey.returns, len({file for file, _ in journey.places}))
            for name in RECIPES
            for journey in [Journey(name, modules)]
        },
    }


def import_seconds(root: Path, name: str) -> float:
    """新进程里导入一个模块的处理器时间，三次取中间；秒。"""
    code = f"import time; t = time.process_time(); import {name}; print(time.process_time() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def report(found: dict[str, object], modules: dict[str, Module]) -> None:
    """把数字打印成几段话，出问题的逐条列出。"""
    print(
        f"{found['文件']} 个文件，{found['行']:,} 行，中位 {found['每个文件的行数，中位']:g} 行，40 行以下的 {found['40 行以下的文件']} 个"
    )
    for room, (files, lines) in found["房间"].items():
        print(f"  {room:<12}{files:>4} 个文件 {lines:>7,} 行")
    for name, (files, lines) in found["闭包"].items():
        print(f"导入 {name}：{files} 个文件，{lines:,} 行")
    if found["必读"]:
        print("预训练从命令到更新，必读 {} 个文件，{:,} 行".format(*found["必读"]))
    for name, (places, returns, files) in found["参数路过"].items():
        print(f"{name} 的参数路过 {places} 处、{files} 个文件，折返 {returns} 次")
    print(f"循环 {found['循环']}，往上的引用 {found['往上的引用']}，同名的公开类 {found['同名的公开类']}")
    for group in found["用到时才合上的循环"]:
        print(f"  用到时才合上：{' ⇄ '.join(group)}")
    for problem in problems(modules):
        print(f"  {problem}")


def problems(modules: dict[str, Module]) -> list[str]:
    """不该有的：循环、往上的引用、同名的公开类。"""
    return [
        *(f"循环：{' ⇄ '.join(group)}" for group in circles(modules)),
        *(f"往上：{source} → {target}（{kind}）" for source, target, kind in upward(modules)),
        *(f"同名：{name} 在 {'、'.join(files)}" for name, files in same_names(modules).items()),
    ]


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="数哪份源码；不是本仓库就只数，不写图")
    parser.add_argument("--check", action="store_true", help="只检查，不写图")
    parser.add_argument("--time", type=int, choices=(0, 1), default=0, help="量导入要多久")
    parser.add_argument("--json", type=Path, help="数字另存成 JSON")
    args = parser.parse_args(argv)
    modules = read_modules(args.root)
    found = figures(modules)
    if args.time:
        found["导入的秒数"] = {name: import_seconds(args.root, name) for name in RECIPES}
    report(found, modules)
    for name, seconds in found.get("导入的秒数", {}).items():
        print(f"导入 {name} 用 {seconds:.2f} 秒（处理器时间）")
    if args.json:
        args.json.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if args.root.resolve() != ROOT:
        return
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    fresh = page_with(draw(modules), page)
    if args.check:
        wrong = problems(modules) + ([f"{PAGE} 里的图旧了，运行 make map"] if fresh != page else [])
        if wrong:
            raise UserError("；".join(wrong), where="房间图")
    elif fresh != page:
        (ROOT / PAGE).write_text(fresh, encoding="utf-8")
        print(f"更新了 {PAGE} 里的图")


if __name__ == "__main__":
    sys.exit(main())
