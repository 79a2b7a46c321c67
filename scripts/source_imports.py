"""由源码数出来的：每个文件引用了谁、导入一个模块会载入什么、有没有循环与往上的引用、参数路过哪些函数。

scripts/map.py 用它画图、打印。
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

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
        "plan",
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
# 在房间里而属于地基的文件：原子写、几个核只引用 errors 与 console，数据与分词器也要用
GROUND_FILES = ("minimind.runtime.files", "minimind.runtime.fair_share")


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


def closure(start: str, modules: dict[str, Module], kinds: tuple[str, ...] = (ON_LOAD,)) -> list[Module]:
    """导入 ``start`` 会载入的全部文件（默认只沿载入时的引用），含沿途各个包的 ``__init__``。"""
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])
        waiting.extend(target for target, kind in modules[name].imports.items() if kind in kinds)
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
    """从 ``run(args)`` 出发跟着参数走；``places`` 是路过的函数，``returns`` 是折返的次数。

    用到才载入的文件也走进去：把引用挪进函数里，路过的地方不会因此变少。
    """

    def __init__(self, recipe: str, modules: dict[str, Module]):
        self.modules = {module.name: module for module in closure(recipe, modules, (ON_LOAD, ON_USE))}
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
