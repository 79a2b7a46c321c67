"""``minimind report``：由日志得到曲线与摘要。"""

import json

import pytest

from minimind.report import training


def write_log(folder, name, records):
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "logs" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


RECORDS = [
    {"step": 10, "loss": 8.0, "tokens": 1000, "tokens_per_s": 500.0, "time": 2.0, "mfu": 0.25},
    {"step": 10, "val_loss": 7.9, "val_bpb": 4.5},
    {"step": 20, "loss": 3.0, "tokens": 2000, "tokens_per_s": 520.0, "time": 64.0, "mfu": 0.26},
    {"step": 20, "val_loss": 3.1, "val_bpb": 1.75},
]


def test_摘要里有首末与最好(tmp_path, monkeypatch, capsys):
    write_log(tmp_path, "pretrain_64", RECORDS)
    write_log(tmp_path, "full_sft_64", RECORDS[:1])
    assert training.main(["--save_dir", str(tmp_path), "--report_dir", str(tmp_path / "r")]) == 0
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {"report.md", "report.json", "pretrain_64.png", "full_sft_64.png"}
    text = (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    for piece in ("20 步", "2,000 词元", "1 分 04 秒", "损失 8.000 → 3.000", "4.500 → 1.750（最低 1.750）"):
        assert piece in text
    assert "report.md" in capsys.readouterr().err


def test_只看一个名字(tmp_path):
    for name in ("pretrain_64", "full_sft_64"):
        write_log(tmp_path, name, RECORDS)
    report = training.build(tmp_path, tmp_path / "r", "full_sft")
    assert list(report.facts) == ["full_sft_64"]


def test_没有日志_说出去哪里找(tmp_path, capsys):
    assert training.main(["--save_dir", str(tmp_path)]) == 2
    assert "先运行一个训练命令" in capsys.readouterr().err


def test_强化学习与偏好的摘要说奖励与准确率():
    rewards = [{"step": s, "loss": 0.0, "reward": s / 10} for s in (1, 5)] + [{"step": 5, "val_reward": 0.75}]
    assert "奖励 0.100 → 0.500，留出题得分 0.750 → 0.750" in training.summarize(rewards)
    assert "分得清好坏 0.500 → 0.900" in training.summarize(
        [{"step": 1, "accuracy": 0.5}, {"step": 2, "accuracy": 0.9}]
    )


def test_报告里看得到同样的提示越答越好_采样的回答与各条奖励(tmp_path):
    shown = [
        {"step": n, "samples": [{"prompt": "3+5？", "answer": f"答`{n}`\n完"}]} for n in range(10, 101, 10)
    ]
    rollouts = [
        {
            "kind": kind,
            "prompt": "84*7？",
            "answer": "588|",
            "reward": 1.5,
            "parts": {"auto": 1.0, "format": 0.5},
        }
        for kind in ("best", "median", "worst")
    ]
    write_log(tmp_path, "grpo_64", [*RECORDS, *shown, {"step": 100, "samples": [], "rollouts": rollouts}])
    report = training.build(tmp_path, tmp_path / "r")
    assert report.timelines == {"grpo_64": {"3+5？": [(n, f"答`{n}`\n完") for n in (10, 40, 70, 100)]}}
    text = report.to_markdown()
    assert "- 第 40 步：`` 答`40`↵完 ``" in text
    assert "| 最差 | `84*7？` | `588\\|` | 1.5 | auto 1，format 0.5 |" in text


GOOD = {"prompt": "3+5？", "answer": "8"}
BROKEN = [
    '{"step": 1, "loss": "不是数"}', '{"step": 2, "loss": true}', '{"step": 3, "loss": [1]}', '{"step": 4, "loss": NaN}',
    '{"step": 5, "loss": 1' + "0" * 400 + "}", '{"step": 6, "samples": 5}', '{"step": 7, "samples": ["文字", {"prompt": 3}, null]}',
    '{"step": 8, "samples": [{"prompt": "3+5？", "answer": null}], "rollouts": [{"kind": "x"}]}', '{"step": 9, "rollouts": {"a": 1}}',
    '{"step": ' + "[" * 100_000, '{"step": 10, "samples": [{"prompt": "\\ud800", "answer": "\\udfff"}]}',
]  # fmt: skip


def test_别的程序写的坏行_只丢那一条_报告照写(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path, "a_64", RECORDS)
    rollout = {"kind": "best", **GOOD, "reward": 1.5, "parts": {"auto": 1.0, "坏": "x"}}
    with open(tmp_path / "logs" / "a_64.jsonl", "a", encoding="utf-8") as file:
        file.write("\n".join(BROKEN) + "\n")
        file.write(json.dumps({"step": 20, "samples": [GOOD, 3], "rollouts": [rollout, {"kind": "worst"}]}))
    assert training.main(["--save_dir", ".", "--report_dir", "r"]) == 0
    text = (tmp_path / "r" / "report.md").read_text("utf-8")
    assert "损失 8.000 → 3.000" in text and "- 第 20 步：`8`" in text
    assert "| 最好 | `3+5？` | `8` | 1.5 | auto 1 |" in text


@pytest.mark.parametrize(
    ("name", "title", "link"),
    [
        ("<img src=x onerror=alert(1)>_64", "&lt;img src=x onerror=alert(1)&gt;_64", "%3Cimg%20src=x%20onerror=alert%281%29%3E_64"),
        ("a b(1)_64", "a b(1)_64", "a%20b%281%29_64"),
        ("$a_$_64", "$a_$_64", "$a_$_64"),
        ("坏]了`_64", "坏\\]了\\`_64", "坏]了`_64"),
        ("两\n行_64", "两↵行_64", "两%0A行_64"),
        (b"\xff_64".decode("utf-8", "surrogateescape"), "�_64", "�_64"),
    ],
)  # fmt: skip
def test_名字再怪_报告与图都写得出_只当文字(tmp_path, name, title, link):
    try:
        write_log(tmp_path, name, [*RECORDS, {"step": 20, "samples": [GOOD]}])
    except OSError:
        pytest.skip("这个文件系统不收这样的名字")
    report = training.build(tmp_path, tmp_path / "r")
    report.write(tmp_path / "r")
    text = (tmp_path / "r" / "report.md").read_text("utf-8")
    assert f"| {title} | 20 步" in text and f"![{title} 曲线]({link}.png)" in text
    assert f"## {title}：同样的提示" in text
    assert len(list((tmp_path / "r").glob("*.png"))) == 1


def test_只看的名字里有方括号_也找得到(tmp_path):
    write_log(tmp_path, "a[1]_64", RECORDS)
    assert list(training.build(tmp_path, tmp_path / "r", "a[1]").facts) == ["a[1]_64"]


def test_报告的目录是个文件_是一句话(tmp_path, capsys):
    write_log(tmp_path, "a_64", RECORDS)
    (tmp_path / "r").touch()
    assert training.main(["--save_dir", str(tmp_path), "--report_dir", str(tmp_path / "r")]) == 2
    assert "错误：--report_dir" in capsys.readouterr().err
