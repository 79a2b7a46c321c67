"""看训练的页面有多快：造 100 次训练、每次 10 万行日志，量服务端的处理器时间与应答的大小。

    python benchmarks/bench_watch.py --runs 100 --lines 100000

日志写在临时目录里（约 1 GB），做完删掉。
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from minimind.watch.app import reply
from minimind.watch.runs import Runs


def write_logs(folder: Path, runs: int, lines: int) -> int:
    """每行约 90 字节；内容相同，名字不同。返回总字节数。"""
    folder.mkdir(parents=True)
    text = "".join(
        f'{{"step": {n}, "loss": {8 / n + n % 97 / 970:.4f}, "lr": {1e-3 * (1 - n / lines):.3e}, '
        f'"tokens": {n * 4096}, "time": {n * 0.31:.2f}}}\n'
        for n in range(1, lines + 1)
    )
    for run in range(runs):
        (folder / f"run{run:03}_512.jsonl").write_text(text)
    return runs * len(text)


def timed(what: str, work) -> object:
    """打印处理器时间与应答的字节数。"""
    start = time.process_time()
    value = work()
    seconds = time.process_time() - start
    print(f"{what:<40}{seconds * 1000:>10.1f} ms{len(value.body) / 1000:>10.0f} kB")
    return json.loads(value.body)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--lines", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_logs(folder / "logs", args.runs, args.lines)
        print(f"{args.runs} 次训练 × {args.lines:,} 行，共 {size / 1e6:.0f} MB")
        runs = Runs(folder)
        rows = timed("清单，头一次", lambda: reply({"runs": runs.list()}))["runs"]
        timed("清单，没有变", lambda: reply({"runs": runs.list()}))
        first = rows[0]["id"]

        def whole(run_id: str):
            while not (found := runs.detail(run_id))["complete"]:
                pass
            return reply(found)

        timed("一次训练的曲线，头一块", lambda: reply(runs.detail(first)))
        version = timed("一次训练的曲线，读完", lambda: whole(first))["version"]
        timed("同一次，没有变", lambda: reply(runs.detail(first, have=version)))
        with open(folder / "logs" / f"{rows[0]['name']}.jsonl", "a") as file:
            file.write(f'{{"step": {args.lines + 1}, "loss": 1.0}}\n')
        timed("同一次，长了一行", lambda: reply(runs.detail(first, have=version)))
        timed("清单，有一次长了一行", lambda: reply({"runs": runs.list()}))
        for row in rows[1:12]:
            whole(row["id"])
        timed("再看其中一段（放大）", lambda: reply(runs.detail(first, low=1000, high=3000)))
        start = time.process_time()
        for row in rows:
            whole(row["id"])
        print(f"{'全部逐个看一遍':<36}{time.process_time() - start:>10.1f} s")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"内存最高 {peak:.0f} MB")


if __name__ == "__main__":
    main()
