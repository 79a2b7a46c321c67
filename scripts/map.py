"""房子的地图：从 import 语句数出每个房间的文件与行数、谁引用谁，画进 docs/training.md。

make map                            # 打印数字，更新 docs/training.md 里的图
python scripts/map.py --check       # 只看图是不是最新的、有没有往上引用与循环；有问题退出码 1
python scripts/map.py --time 1      # 另量导入配方要多久（处理器时间，三次取中间）
python scripts/map.py --root 旧的目录 --json before.json    # 数另一份源码，比较前后

数的是什么：

- 引用分三种：载入时（模块顶层）、用到时（函数里面）、只为类型（``if TYPE_CHECKING``）。闭包只沿第一种走，与
  ``sys.modules`` 里看到的一致。循环算第一、三两种，靠“用到时”才合上的另列；往上的引用三种都不许有。
- 参数路过的地方：从配方的 ``run(args)`` 出发，按源码次序跟着调用往里走，每个函数只进一次。读 ``args.什么``、
  ``self.args.什么``，或把它们交给别人的函数算一处；换到一个早先到过的文件算一次折返。
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
TARGET = re.compile(r"minimind[\w.]*:\w+")  # 命令表里的 ``模块:函数``，选中了才导入
ON_LOAD, ON_USE, FOR_TYPES = "载入时", "用到时", "只为类型"

# 由上到下；只许引用同一层与下面的层。没有列出的顶层文件（errors、arguments、paths……）都是地基
LAYERS = {
    "入口": (
        "cli",
        "__main__",
        "launch",
        "chat",
        "demo",
        "benchmarks",
        "scripts",
        "eval_llm",
        "trainer_commands",
    ),
    "成品": ("recipes", "serve", "watch", "evaluate", "report", "selftest", "tools"),
    "训练": ("rl", "trainer"),
    "推理、公式、导出": ("inference", "objectives", "export"),
    "运行": ("runtime",),
    "数据": ("dataset", "tokenizer", "microworld"),
    "模型": ("model",),
    "地基": ("地基",),
}
GROUND = "地基"
# 在房间里而属于地基的文件：原子写只引用 errors，数据与分词器也要用它
GROUND_FILES = ("minimind.runtime.files",)


@dataclass
class Module:
    """一个源文件：名字、行数、它的引用 ``{模块: 哪一种}``（同一个模块取最早的一种）与语法树。"""

    name: str
    path: Path
    lines: int
    tree: ast.Module
    imports: dict[str, str] = field(default_factory=dict)

    @property
    def room(self) -> str:
        """它在哪个房间：``minimind`` 下的文件夹，或地基、入口的文件名。"""
        parts = self.name.split(".")
        if parts[0] != "minimind":
            return parts[0]
        if self.name in GROUND_FILES or len(parts) == 1:
            return GROUND
        known = {room for rooms in LAYERS.values() for room in rooms}
        return parts[1] if parts[1] in known else GROUND


def read_modules(root: Path) -> dict[str, Module]:
    """读入 ``minimind/`` 的全部源文件与它们之间的引用；仓库里别的命令（benchmarks、scripts……）也算入口。"""
    modules: dict[str, Module] = {}
    outside = [*root.glob("benchmarks/*.py"), *root.glob("scripts/*.py"), *root.glob("eval_llm.py")]
    for path in sorted([*root.glob("minimind/**/*.py"), *outside, *root.glob("trainer/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] == "trainer":
            parts = ("trainer_commands", *parts[1:])
        name = ".".join(parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        modules[name] = Module(name, path, text.count("\n"), ast.parse(text))
    for module in modules.values():
        for kind, target in _imports(module, modules):
            if target != module.name and module.imports.get(target, FOR_TYPES) in (FOR_TYPES, ON_USE):
                earlier = module.imports.get(target)
                module.imports[target] = min((kind, earlier or kind), key=(ON_LOAD, ON_USE, FOR_TYPES).index)
    return modules


def _imports(module: Module, modules: dict[str, Module]) -> list[tuple[str, str]]:
    """源码里的每一处引用：``(哪一种, 模块)``。"""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    found = []

    def visit(node: ast.AST, kind: str) -> None:
        if isinstance(node, ast.Constant) and TARGET.fullmatch(str(node.value)):
            found.append((ON_USE, node.value.partition(":")[0]))
        elif isinstance(node, ast.Import):
            found.extend((kind, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *base.split(".")] if base else above)
            for alias in node.names:
                found.append((kind, _home(base, alias.name, modules)))
        for child in ast.iter_child_nodes(node):
            inner = kind
            if kind != FOR_TYPES and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = ON_USE
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = FOR_TYPES
            visit(child, inner)

    visit(module.tree, ON_LOAD)
    return [(kind, name) for kind, name in found if name in modules]


def _home(base: str, name: str, modules: dict[str, Module]) -> str:
    """``from base import name`` 引用的是哪个文件；包里用 ``_HOMES`` 写着的名字用到时才从那个文件取。"""
    if f"{base}.{name}" in modules:
        return f"{base}.{name}"
    for node in modules[base].tree.body if base in modules else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            home = ast.literal_eval(node.value).get(name)
            return f"{base}.{home}" if home else base
    return base


def closure(start: str, modules: dict[str, Module]) -> list[Module]:
    """导入 ``start`` 会载入的全部文件（只沿载入时的引用），含沿途各个包的 ``__init__``。"""
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])
        waiting.extend(target for target, kind in modules[name].imports.items() if kind == ON_LOAD)
    return [modules[name] for name in sorted(seen)]


def circles(modules: dict[str, Module], kinds: tuple[str, ...] = (ON_LOAD, FOR_TYPES)) -> list[list[str]]:
    """互相引用的文件，只数 ``kinds`` 这几种引用；每组是一个强连通分量。"""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def connect(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in (target for target, kind in modules[name].imports.items() if kind in kinds):
            if target not in order:
                connect(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in modules:
        if name not in order:
            connect(name)
    return sorted(found)


def depth(room: str) -> int:
    """房间在第几层，0 是最上面的入口。"""
    return next(i for i, rooms in enumerate(LAYERS.values()) if room in rooms)


def upward(modules: dict[str, Module]) -> list[tuple[str, str, str]]:
    """往上的引用 ``(谁, 引用了谁, 哪一种)``；``model/`` 随权重单独发行，连地基也不许引用。"""
    return [
        (module.name, target, kind)
        for module in modules.values()
        for target, kind in module.imports.items()
        if depth(module.room) > depth(modules[target].room)
        or (module.room == "model" and modules[target].room != "model")
    ]


def same_names(modules: dict[str, Module]) -> dict[str, list[str]]:
    """库里同名的公开类：``{类名: [在哪些文件]}``。"""
    homes: dict[str, list[str]] = {}
    for module in modules.values():
        if module.name.startswith("minimind"):
            for node in module.tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, []).append(module.name)
    return {name: files for name, files in sorted(homes.items()) if len(files) > 1}


class Journey:
    """从 ``run(args)`` 出发跟着参数走；``places`` 是路过的函数，``returns`` 是折返的次数。"""

    def __init__(self, recipe: str, modules: dict[str, Module]):
        self.modules = {module.name: module for module in closure(recipe, modules)}
        self.functions: dict[tuple[str, str], ast.AST] = {}
        self.methods: dict[str, list[tuple[str, str]]] = {}
        for module in self.modules.values():
            for node in module.tree.body:
                if isinstance(node, ast.FunctionDef):
                    self.functions[module.name, node.name] = node
                for inner in node.body if isinstance(node, ast.ClassDef) else ():
                    if isinstance(inner, ast.FunctionDef):
                        key = (module.name, f"{node.name}.{inner.name}")
                        self.functions[key] = inner
                        self.methods.setdefault(inner.name, []).append(key)
        self.places: list[tuple[str, str]] = []
        self.returns, self._seen, self._been = 0, set(), set()
        self._here = ""
        self._walk((recipe, "run"))

    def _walk(self, key: tuple[str, str]) -> None:
        if key in self._seen:
            return
        self._seen.add(key)
        body = self.functions[key]
        if any(_is_args(node) for node in ast.walk(body)):
            self._enter(key)
        calls = [node for node in ast.walk(body) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
            target = self._resolve(key, call.func)
            if target is not None:
                self._walk(target)
                if any(_is_args(node) for node in ast.walk(body)):
                    self._move(key[0])

    def _enter(self, key: tuple[str, str]) -> None:
        self.places.append(key)
        self._move(key[0])

    def _move(self, file: str) -> None:
        if file != self._here:
            self.returns += file in self._been
            self._been.add(file)
            self._here = file

    def _resolve(self, key: tuple[str, str], func: ast.expr) -> tuple[str, str] | None:
        """被调用的是哪个函数；类是它的 ``__init__``。方法按名字找：闭包里只有一个类有它才算。"""
        module, owner = self.modules[key[0]], key[1].rpartition(".")[0]
        if isinstance(func, ast.Name):
            return self._named(module, func.id)
        if not isinstance(func, ast.Attribute):
            return None
        if isinstance(func.value, ast.Name):
            if func.value.id in ("self", "cls") and (key[0], f"{owner}.{func.attr}") in self.functions:
                return key[0], f"{owner}.{func.attr}"
            for target in module.imports:
                if target.rpartition(".")[2] == func.value.id and target in self.modules:
                    return self._named(self.modules[target], func.attr)
        homes = self.methods.get(func.attr, [])
        return homes[0] if len(homes) == 1 else None

    def _named(self, module: Module, name: str) -> tuple[str, str] | None:
        for home in (module, *(self.modules[t] for t in module.imports if t in self.modules)):
            for local in (name, f"{name}.__init__"):
                if (home.name, local) in self.functions:
                    return home.name, local
        return None


def _is_args(node: ast.AST) -> bool:
    """``args`` 这个名字，或 ``什么.args``。"""
    return (isinstance(node, ast.Name) and node.id == "args") or (
        isinstance(node, ast.Attribute) and node.attr == "args"
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
