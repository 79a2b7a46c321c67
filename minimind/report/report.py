"""运行报告：同一份数字写成 report.md（给人看）、report.json（给程序读）和终端里的记分牌。"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

from minimind.runtime.files import write_text
from minimind.trainer.exhibits import KINDS


@dataclass(frozen=True)
class Metric:
    """记分牌的一行。

    Args:
        stage: 阶段名，例如 ``预训练``。
        name: 指标名，例如 ``每字节比特（留出）``。
        before, after: 阶段前后的值；没有「之前」时为 ``None``。
        kind: ``ratio`` 按百分数显示，``number`` 按三位小数。
        higher_is_better: 决定涨是好事还是坏事。
        english: 画图时没有中文字体用的短名。
        explanation: 一两句话，这个数是什么意思；空的就不写。
    """

    stage: str
    name: str
    before: float | None
    after: float
    kind: str = "ratio"
    higher_is_better: bool = True
    english: str = ""
    explanation: str = ""

    def show(self, value: float | None) -> str:
        if value is None:
            return "—"
        return f"{value * 100:.1f}%" if self.kind == "ratio" else f"{value:.3f}"

    @property
    def improved(self) -> bool:
        if self.before is None:
            return True
        return (self.after > self.before) == self.higher_is_better


@dataclass(frozen=True)
class BeforeAfter:
    """一道留出题与模型前后的回答，原样不改。"""

    task: str
    prompt: str
    reference: str
    before: str
    after: str
    score: float


@dataclass
class Report:
    """一次运行的全部结果。

    Args:
        title: 标题。
        facts: 设备、参数量、用时之类的说明，按给出的次序显示。
        metrics: 记分牌。
        tasks: 每个任务的题数与前后正确率 ``{任务: {"items", "before", "after"}}``。
        samples: 样例。
        timelines: ``{日志: {提示: [(步, 回答)]}}``：训练途中同样的提示怎么答，步数从小到大。
        rollouts: ``{日志: [采样的回答]}``：强化学习最后一次样例里最好、居中、最差的，各带总分与各条奖励。
        figures: 图片文件名（与报告在同一目录）及说明。
        failures: 没有走完的阶段及原因。
    """

    title: str
    facts: dict[str, str | int | float] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    tasks: dict[str, dict] = field(default_factory=dict)
    samples: list[BeforeAfter] = field(default_factory=list)
    timelines: dict[str, dict[str, list[tuple[int, str]]]] = field(default_factory=dict)
    rollouts: dict[str, list[dict]] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Report | None:
        """:meth:`write` 写下的那一份；没有，或读不成，是 ``None``。"""
        try:
            held = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
            held["metrics"] = [Metric(**row) for row in held["metrics"]]
            held["samples"] = [BeforeAfter(**row) for row in held["samples"]]
            report = cls(**held)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        tables = (
            report.facts,
            report.tasks,
            report.timelines,
            report.rollouts,
            report.figures,
            report.failures,
        )
        return report if all(isinstance(table, dict) for table in tables) else None

    def inherit(self, old: Report, own: Collection[str], numbers_only: bool) -> None:
        """别的阶段的成绩照上一次的。

        Args:
            old: 上一次的。
            own: 这一次要走、或因此作废的阶段，它们的不要旧的。
            numbers_only: 只要记分牌与用时，图、样例、各任务也不要旧的。
        """
        self.facts |= {
            name: value
            for name, value in old.facts.items()
            if name not in own and name not in self.facts and name in {m.stage for m in old.metrics}
        }
        self.metrics += [metric for metric in old.metrics if metric.stage not in own]
        self.failures |= {stage: why for stage, why in old.failures.items() if stage not in own}
        if numbers_only:
            return
        for name in ("tasks", "timelines", "rollouts", "figures"):
            setattr(self, name, {**getattr(old, name), **getattr(self, name)})
        self.samples = self.samples or old.samples

    def to_markdown(self) -> str:
        blocks = [f"# {self.title}"]
        if self.facts:
            blocks.append(_table(["项", "值"], [[_name(key), value] for key, value in self.facts.items()]))
        if self.metrics:
            rows = [[m.stage, m.name, m.show(m.before), m.show(m.after)] for m in self.metrics]
            blocks += ["## 记分牌", _table(["阶段", "指标", "之前", "之后"], rows)]
        if told := [m for m in self.metrics if m.explanation]:
            lines = [f"- **{m.stage}｜{m.name}**：{_plain(m.explanation)}" for m in told]
            blocks += ["### 这些数是什么意思", "\n".join(lines)]
        if self.failures:
            rows = [[stage, _inline(reason, 500)] for stage, reason in self.failures.items()]
            blocks += ["## 没有走完的阶段", _table(["阶段", "原因"], rows)]
        for name, caption in self.figures.items():
            blocks.append(f"![{_name(caption)}]({_link(name)})")
        if self.tasks:
            rows = [
                [
                    entry.get("title", task),
                    entry["items"],
                    _percent(entry["before"]),
                    _percent(entry["after"]),
                ]
                for task, entry in self.tasks.items()
            ]
            blocks += ["## 各任务", _table(["任务", "留出题数", "微调前", "微调后"], rows)]
        if self.samples:
            blocks.append("## 样例（留出题目，贪心生成，原样）")
            for sample in self.samples:
                blocks.append(
                    f"**{sample.task}**（得分 {sample.score:g}）\n\n"
                    f"- 问：{_inline(sample.prompt)}\n"
                    f"- 参考答案：{_inline(sample.reference)}\n"
                    f"- 微调前：{_inline(sample.before)}\n"
                    f"- 微调后：{_inline(sample.after)}"
                )
        for log, prompts in self.timelines.items():
            blocks.append(f"## {_name(log)}：同样的提示，训练途中怎么答（贪心，原样）")
            for prompt, answers in prompts.items():
                lines = [f"- 第 {step:,} 步：{_inline(answer)}" for step, answer in answers]
                blocks.append("\n".join([f"问：{_inline(prompt)}", "", *lines]))
        for log, picked in self.rollouts.items():
            rows = [
                [KINDS.get(one["kind"], _name(one["kind"])), _inline(one["prompt"]), _inline(one["answer"])]
                + [
                    f"{one['reward']:g}",
                    "，".join(f"{_name(part)} {value:g}" for part, value in one["parts"].items()),
                ]
                for one in picked
            ]
            header = ["", "问", "采样的回答", "奖励", "各条奖励"]
            blocks += [f"## {_name(log)}：最后一次采样里最好、居中、最差的", _table(header, rows)]
        return "\n\n".join(blocks) + "\n"

    def write(self, folder: str | Path) -> Path:
        """写出 report.md 与 report.json（先写临时文件再改名），返回 report.md 的路径。"""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / "report.json", json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n")
        return _write_text(folder / "report.md", self.to_markdown())

    def scoreboard(self):
        """终端里的记分牌（rich 表格）。"""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for name in ("阶段", "指标"):
            table.add_column(name)
        for name in ("之前", "之后"):
            table.add_column(name, justify="right")
        for metric in self.metrics:
            style = "green" if metric.improved else "red"
            after = f"[{style}]{metric.show(metric.after)}[/]"
            table.add_row(metric.stage, metric.name, metric.show(metric.before), after)
        return table


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{value:.1%}"


def _plain(text: str) -> str:
    """markdown 正文里的一句话：尖括号不当标签。"""
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _name(text: str) -> str:
    """正文、表格、标题里的一个名字：日志的文件名里可以有尖括号、方括号、换行，都只当文字。"""
    return re.sub(r"([\[\]`])", r"\\\1", _plain(_one_line(text)))


def _link(name: str) -> str:
    """图片的地址：空格、括号之类在 markdown 里另有意思的字符写成百分号。"""
    return re.sub(r"[\s()<>%#?\\]", lambda found: quote(found[0]), name)


def _one_line(text: str) -> str:
    """换行写成 ↵；单独的回车在 markdown 里也是换行。"""
    return re.sub(r"\r\n|\r|\n", "↵", text)


def _inline(text: str, limit: int = 300) -> str:
    """放进 markdown 行内代码：换行写成 ↵，围栏比里面最长的一串反引号还长，太长的截断并注明。"""
    text = _one_line(text)
    if len(text) > limit:
        text = f"{text[:limit]}…（共 {len(text)} 字）"
    ticks = re.findall("`+", text)
    fence = "`" * (max(map(len, ticks), default=0) + 1)
    pad = " " if ticks else ""
    return f"{fence}{pad}{text or ' '}{pad}{fence}"


def _table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _write_text(path: Path, text: str) -> Path:
    write_text(path, text.encode("utf-8", "replace").decode())  # 日志里的文字可以有落单的代理字符
    return path
