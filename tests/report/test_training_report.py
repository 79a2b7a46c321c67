"""``minimind report``：由日志得到曲线与摘要。"""

import json

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
