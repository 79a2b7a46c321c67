"""公共项目叫这个名字的脚本：``python scripts/convert_model.py hf full_sft 目录``；正文在 minimind/export/。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minimind.cli import main
from minimind.errors import UserError, guard

WAYS = {"hf": ["export", "hf"], "gguf": ["export", "gguf"], "import": ["import"]}


@guard
def convert(argv: list[str]) -> int | None:
    """第一个词选方向，其余照旧传下去。"""
    usage = "python scripts/convert_model.py {hf,gguf,import} 来源 目标"
    if argv and argv[0] in ("-h", "--help"):
        print(f"用法：{usage}\n\n各方向的参数：python scripts/convert_model.py hf --help")
        return 0
    if not argv or argv[0] not in WAYS:
        raise UserError(
            f"第一个词是 {argv[0] if argv else '空'}",
            expected="、".join(WAYS),
            fix=f"{usage}；用 minimind export hf --help 看参数",
        )
    return main([*WAYS[argv[0]], *argv[1:]])


if __name__ == "__main__":
    raise SystemExit(convert(sys.argv[1:]))
