"""质量基准的汇总：由曲线算出到达目标的时间与份额，打印成表。"""

from __future__ import annotations

from typing import Any

from common import median, print_table


def time_to(curve: list[dict[str, float]], target: float, key: str = "seconds") -> float | None:
    """曲线首次降到 ``target``（val_bpb）时的 ``key``；相邻两点线性插值，一直没到返回 None。

    第一个点之前不外推：第一个点就已经到了，返回第一个点（往慢里算）。
    """
    for before, after in zip([None, *curve], curve):
        if after["val_bpb"] > target:
            continue
        if before is None:
            return after[key]
        share = (before["val_bpb"] - target) / (before["val_bpb"] - after["val_bpb"])
        return before[key] + share * (after[key] - before[key])
    return None


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """各配方的终点、到达两个目标的时间与比例；逐种子配对，再取中位数。"""
    ends = {name: median([r["curve"][-1]["val_bpb"] for r in rs]) for name, rs in runs.items()}
    adamws = [name for name in runs if name.startswith("adamw")]
    best_adamw = min(adamws, key=lambda name: ends[name], default=None)
    owners = {"public": "public" if "public" in runs else None, "best_adamw": best_adamw}
    rows = {}
    for name, rs in runs.items():
        row: dict[str, Any] = {
            "title": rs[0]["recipe"],
            "seeds": len(rs),
            "val_bpb": ends[name],
            "val_bpb_each": [r["curve"][-1]["val_bpb"] for r in rs],
            "seconds": median([r["seconds"] for r in rs]),
            "tokens_per_second": median([r["tokens"] / r["seconds"] for r in rs]),
        }
        for target, owner in owners.items():
            if owner is None:
                continue
            for key, suffix in (("seconds", "time"), ("step", "steps")):
                shares = []
                for mine, theirs in zip(rs, runs[owner]):
                    reached = time_to(mine["curve"], theirs["curve"][-1]["val_bpb"], key)
                    shares.append(None if reached is None else reached / theirs["curve"][-1][key])
                row[f"{suffix}_share_to_{target}_each"] = shares
                row[f"{suffix}_share_to_{target}"] = None if None in shares else median(shares)
        rows[name] = row
    clocks = sorted({run.get("clock", "perf_counter") for rs in runs.values() for run in rs})
    return {"best_adamw": best_adamw, "clocks": clocks, "recipes": rows}


def show(args: Any, summary: dict[str, Any], parameters: int) -> None:
    def share(row: dict[str, Any], key: str) -> str:
        value = row.get(key)
        return "—" if value is None else f"{value:.3f}"

    rows = [
        [
            row["title"], row["seeds"], f"{row['val_bpb']:.4f}", f"{row['seconds']:.0f}", f"{row['tokens_per_second']:,.0f}",
            share(row, "steps_share_to_public"), share(row, "time_share_to_public"),
            share(row, "steps_share_to_best_adamw"), share(row, "time_share_to_best_adamw"),
        ]
        for row in summary["recipes"].values()
    ]  # fmt: skip
    best = summary["recipes"].get(summary["best_adamw"], {}).get("title", "无")
    print_table(
        f"到达同样质量要多久：{parameters / 1e6:.1f}M 参数，{args.steps} 步 × {args.batch_size * args.max_seq_len} 词元",
        [
            "配方",
            "种子",
            "终点 bpb",
            "训练秒",
            "词元/秒",
            "到公开终点 步",
            "时间",
            "到最好 AdamW 终点 步",
            "时间",
        ],
        rows,
        f"“步”“时间”是占目标主人全程的份额，越小越快；最好的 AdamW：{best}。目标：时间 ≤ 0.25 与 ≤ 0.5。"
        f"秒数的时钟：{'、'.join(summary['clocks'])}（process_time 是单线程的处理器时间，不是墙钟）。",
    )


def thin(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[list[list[float]]]]:
    """结果里附的曲线：每点只留 [步, 训练秒, val_bpb]。"""
    return {
        name: [[[p["step"], round(p["seconds"], 2), round(p["val_bpb"], 4)] for p in r["curve"]] for r in rs]
        for name, rs in runs.items()
    }
