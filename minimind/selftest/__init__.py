"""``minimind selftest``：两分钟查清这台机器算得对不对、多快。

我们只有 CPU 的机器；别的卡、NPU、MPS 靠这条命令自己查：每一项都与 CPU 上 fp32、照公式写的算法比，
出一张表、一句结论、一份可以附在报告里的 JSON。有一项不对，退出码就是 1。
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minimind.arguments import Arguments, arg, parse_args
from minimind.console import say
from minimind.errors import guard
from minimind.paths import resolve_path
from minimind.ranges import DEVICE

if TYPE_CHECKING:
    import torch

    from minimind.selftest.rows import Check


@dataclass
class SelftestArguments(Arguments):
    """自检：这台机器的每种精度、编译、解码、存取、多进程算得对不对，有多快。"""

    device: str = arg("auto", "查哪个设备：auto、cpu、cuda:0、npu:0、mps", pattern=DEVICE)
    minutes: float = arg(2.0, "至多多少分钟；到了时间，剩下的记为未测", above=0, high=1440)
    out: str = arg("out/selftest.json", "结果的 JSON 写到哪里，报告问题时附上它", text="path")


def all_checks(device: torch.device) -> list[Check]:
    """全部检查，按做的次序：便宜的、要紧的在前，编译最慢，放在最后。"""
    from minimind.runtime.device import choose_dtype
    from minimind.selftest.decoding import decoding_checks
    from minimind.selftest.numerics import PRECISIONS, compiled_checks, eager_checks
    from minimind.selftest.pair import pair_checks
    from minimind.selftest.speed import speed_checks
    from minimind.selftest.toys import in_one_thread
    from minimind.selftest.training import training_checks

    dtype = choose_dtype("auto", device)
    default = next(name for name, precision in PRECISIONS.items() if precision.dtype == dtype)
    small = [
        *eager_checks(device),
        *decoding_checks(device, default),
        *training_checks(device, default),
    ]
    slow = [*pair_checks(device), *compiled_checks(device, default)]
    if device.type == "cpu":
        small, slow = (
            [replace(check, run=in_one_thread(check.run)) for check in checks] for checks in (small, slow)
        )
    return [*small, *speed_checks(device, default), *slow]


@guard
def main(argv: list[str] | None = None) -> int:
    """查一遍，打印表与结论，写 JSON；有一项不对返回 1。"""
    args = parse_args(SelftestArguments, argv, prog="minimind selftest")
    from minimind.runtime.device import prepare_device, resolve_device
    from minimind.runtime.files import check_writable
    from minimind.selftest.rows import FAILED, PASSED, run_checks
    from minimind.selftest.show import environment, print_table, progress_line, verdict, write_json

    check_writable(resolve_path(args.out).parent, "--out")
    device = resolve_device(args.device)
    prepare_device(device)
    where = environment(device)
    checks = all_checks(device)
    say(f"设备 {where['设备']}，{len(checks)} 项，至多 {args.minutes:g} 分钟。")
    rows = run_checks(
        checks,
        60 * args.minutes,
        lambda number, row: say(progress_line(number, len(checks), row)),
    )
    sentence = verdict(rows, where["设备"])
    path = resolve_path(args.out)
    write_json(path, rows, where, sentence)
    print_table(rows, where)
    print(f"{sentence}\n结果已写进 {path}，报告问题时请附上它。")
    failed = any(row.status == FAILED for row in rows)
    return 1 if failed or not any(row.status == PASSED for row in rows) else 0
