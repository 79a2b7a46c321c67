"""``minimind plan``：这么多分钟能训练出什么。

测一测这台机器（或取一张卡公布的数），说出哪个尺寸、多少词元、每步多少，预期的每字节比特数与它的区间，和照抄就能跑的命令；
``--go 1`` 接着就跑。测法在 ``measure``，排法在 ``planning``，每字节比特数的拟合在 ``quality``。
"""

from __future__ import annotations

from minimind.arguments import parse_args
from minimind.errors import guard
from minimind.plan.arguments import PlanArguments

__all__ = ["PlanArguments", "main"]


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    args = parse_args(PlanArguments, argv, prog="minimind plan")
    from minimind.paths import resolve_path
    from minimind.plan.draw import draw_plan
    from minimind.plan.show import go, show, write_plan
    from minimind.runtime.files import check_writable

    folder = resolve_path(args.save_dir)
    check_writable(folder, "--save_dir")
    plan = draw_plan(args)
    write_plan(plan, args, folder)
    show(plan, args)
    if args.go:
        go(plan, args, folder)
