"""报告：同一份数字三种写法，图在没有中文字体的机器上也画得出。"""

import io
import json
import struct

import pytest
from rich.console import Console

from minimind import figures
from minimind.report import curves
from minimind.report.logs import read_log, series
from minimind.report.report import BeforeAfter, Metric, Report

REPORT = Report(
    title="微世界演示",
    facts={"设备": "cpu"},
    metrics=[
        Metric("预训练", "每字节比特", 8.0, 1.25, kind="number", higher_is_better=False),
        Metric("微调", "正确率", 0.02, 0.875),
        Metric("预训练", "填空", None, 0.5),
    ],
    tasks={"加法": {"items": 40, "before": 0.0, "after": 0.925}},
    samples=[BeforeAfter("加法", "1+1=?\n请回答", "2", "a`b|c", "2", 1.0)],
    figures={"pretrain.png": "预训练曲线"},
)


def test_三种写法数字一致(tmp_path):
    markdown = REPORT.write(tmp_path / "report").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(REPORT.scoreboard())
    board = console.export_text()
    for text in (markdown, board):
        for number in ("8.000", "1.250", "2.0%", "87.5%", "—"):
            assert number in text
    assert data["metrics"][1]["after"] == 0.875
    assert data["tasks"]["加法"]["items"] == 40
    assert "92.5%" in markdown
    assert "![预训练曲线](pretrain.png)" in markdown
    assert not list((tmp_path / "report").glob("*.tmp"))


def test_回答里的换行与反引号不破坏排版():
    lines = REPORT.to_markdown().splitlines()
    assert "- 问：`1+1=?↵请回答`" in lines
    assert "- 微调前：`` a`b|c ``" in lines


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("a ``b`` <script>", "``` a ``b`` <script> ```"),
        ("````", "````` ```` `````"),
        ("一\r\r<b>二\r\n三", "`一↵↵<b>二↵三`"),
    ],
)
def test_回答里有几个反引号与回车_也出不了行内代码(answer, written):
    """出得去，后面的 <script> 就是真的标签。"""
    report = Report(title="x", timelines={"log": {"问": [(1, answer)]}})
    assert f"- 第 1 步：{written}" in report.to_markdown().split("\n")


@pytest.mark.parametrize(("before", "after", "higher", "good"), [(1, 2, True, True), (1, 2, False, False)])
def test_变好还是变坏看指标方向(before, after, higher, good):
    assert Metric("", "", before, after, higher_is_better=higher).improved is good


def test_读日志_跳过写到一半的行(tmp_path):
    log = tmp_path / "a.jsonl"
    log.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "val_bpb": 1.5}\n{"step": 3, "lo', encoding="utf-8")
    records = read_log(log)
    assert series(records, "loss") == ([1.0], [3.0])
    assert series(records, "val_bpb") == ([2.0], [1.5])
    assert read_log(tmp_path / "none.jsonl") == []


def png_size(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize("font", [None, "real"])
def test_画曲线(tmp_path, monkeypatch, recwarn, font):
    if font is None:
        monkeypatch.setattr(figures, "chinese_font", lambda: None)
    records = [{"step": s, "loss": 9.0 / s} for s in range(1, 20)]
    narrow = curves.plot_stage(records, "pretrain", tmp_path / "a.png")
    wide = curves.plot_stage([*records, {"step": 20, "val_bpb": 2.0}], "pretrain", tmp_path / "b.png")
    assert png_size(wide)[0] > png_size(narrow)[0] > 300
    assert curves.plot_stage([], "sft", tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    bars = curves.plot_tasks({"add": 0.0}, {"add": 0.9, "sort": 0.8}, tmp_path / "tasks.png")
    assert png_size(bars)[1] > 100
    rewards = [{"step": s, "reward": s / 20} for s in range(1, 20)]
    both = curves.plot_rewards({"GRPO": (rewards, 128), "SPO": (rewards, 128)}, tmp_path / "rewards.png")
    board = curves.plot_scores(
        [("预训练：填空", "cloze", None, 0.8), ("DPO：客气", "polite", 0.1, 0.9)], tmp_path / "board.png"
    )
    assert png_size(both)[0] > png_size(board)[0] > 300
    # 画不出的字会有 Glyph missing 警告
    assert not [w for w in recwarn if "missing from" in str(w.message)]


@pytest.mark.parametrize(
    ("keys", "panels"),
    [
        (("loss", "val_loss", "val_bpb"), ["loss", "val_bpb"]),
        (("loss", "val_loss"), ["loss", "val_loss"]),
        (("loss", "margin", "accuracy"), ["margin", "accuracy", "loss"]),
        (("loss", "reward", "entropy", "val_reward"), ["reward", "val_reward", "entropy"]),
        (("lr",), []),
    ],
)
def test_画哪几格由日志里有什么决定(keys, panels):
    logs = {"a": [{"step": 1, keys[0]: 0.5}], "b": [{"step": 2, **dict.fromkeys(keys, 0.5)}]}
    assert [panel[0] for panel in curves.choose_panels(logs)] == panels


def test_横轴是采样的条数(tmp_path, monkeypatch):
    """预算相同才好比：步数不同、每步条数不同的两次，走到同一处。"""
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, style, path: drawn.append(figure) or path)
    few = [{"step": s, "reward": 0.1} for s in (1, 8)]
    many = [{"step": s, "reward": 0.2} for s in (1, 4)]
    few.append({"step": 8, "val_reward": 0.5})
    curves.plot_rewards({"GRPO": (few, 64), "SPO": (many, 128)}, tmp_path / "r.png", start=0.3)
    left, right = drawn[0].axes
    assert [line.get_xdata()[-1] for line in left.get_lines()] == [512, 512]
    assert list(right.get_lines()[0].get_xydata().flat) == [0, 0.3, 512, 0.5]


def test_没走完的阶段写在报告里():
    report = Report(title="演示", failures={"DPO": "显存不够|在第 3 步"})
    assert "| DPO | `显存不够\\|在第 3 步` |" in report.to_markdown()


def test_没见过名字的中文字体也用得上_没有汉字的不算(tmp_path):
    import shutil
    from pathlib import Path

    from matplotlib import font_manager

    plain = tmp_path / "a-cjk-regular.ttf"
    shutil.copy(font_manager.findfont("DejaVu Sans"), plain)  # 名字像，里面没有汉字
    broken = tmp_path / "b-cjk.otf"
    broken.write_bytes(b"not a font")
    assert figures._font_from_files([str(plain), str(broken), str(tmp_path / "c.ttf")]) is None
    real = [path for path in font_manager.findSystemFonts() if "cjk" in Path(path).name.lower()]
    if not real:
        pytest.skip("系统里没有中文字体文件")
    name = figures._font_from_files([str(broken), str(plain), *real])
    assert font_manager.findfont(name, fallback_to_default=False) in real


def test_任务与各条曲线_有中文字体时用中文名(tmp_path, monkeypatch):
    seen = []
    real = curves.save_figure

    def spy(figure, style, path):
        axis = figure.axes[0]
        legend = axis.get_legend()
        seen.append(
            [t.get_text() for t in axis.get_yticklabels()]
            + [t.get_text() for t in (legend.texts if legend else ())]
        )
        return real(figure, style, path)

    monkeypatch.setattr(curves, "save_figure", spy)
    for chinese, expected in ((True, {"加法", "排序"}), (False, {"add", "sort"})):
        monkeypatch.setattr(curves, "labeler", lambda chinese=chinese: lambda a, b: a if chinese else b)
        titles = {"add": "加法", "sort": "排序"}
        curves.plot_tasks({"add": 0.0}, {"add": 0.9, "sort": 0.8}, tmp_path / "tasks.png", titles)
        assert expected <= set(seen[-1])


def test_解释写进报告_尖括号不当标签():
    metric = Metric("推理", "多步题", 0.1, 0.9, english="x", explanation="先写在 <think> 里再答。")
    text = Report("成绩单", metrics=[metric, Metric("别的", "没有解释", None, 1.0)]).to_markdown()
    assert "- **推理｜多步题**：先写在 &lt;think&gt; 里再答。" in text
    assert "**别的｜" not in text
