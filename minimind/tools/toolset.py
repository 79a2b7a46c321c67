"""一道题用哪些工具：题里列着的，加上使用者的文件；列着而没有人会执行的，开训之前就说。"""

from __future__ import annotations

from typing import Any

from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.runtime.files import content_hash
from minimind.tokenizer import encode_chat
from minimind.tokenizer.render import dump_json, tools_of
from minimind.tools import EXAMPLE_TOOLS
from minimind.tools.archive import archive
from minimind.tools.base import Tool, Toolbox
from minimind.tools.beside import tools_beside
from minimind.tools.public import PUBLIC_TOOLS


def name_of(tool: Any) -> str:
    """一条工具说明里的名字；没有，或写得不成样子，是空的。"""
    spec = (tool.get("function") or tool) if isinstance(tool, dict) else None
    name = spec.get("name") if isinstance(spec, dict) else None
    return name if isinstance(name, str) else ""


class Toolset:
    """会执行的全部工具。

    Args:
        file: 使用者的 ``.py`` 文件；与自带的同名时用他的。没有列工具的题，就列出他的。
        timeout: 他的工具一次最多几秒。

    Attributes:
        own: 使用者的工具。
        identity: 结果由哪些文件决定，续训时核对。
    """

    def __init__(self, file: str | None = None, timeout: float = 10.0):
        self.own: list[Tool] = tools_beside(file, timeout) if file else []
        shipped = {tool.name: tool for tool in (*EXAMPLE_TOOLS, *PUBLIC_TOOLS)}
        self.known = shipped | {tool.name: tool for tool in self.own}
        self.identity = content_hash(resolve_path(file)) if file else ""

    def listed(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """这道题给模型看的工具说明。"""
        return tools_of(record["conversations"]) or [tool.schema() for tool in self.own]

    def names(self, record: dict[str, Any]) -> list[str]:
        """这道题列着的工具名。"""
        return [name_of(tool) for tool in self.listed(record)]

    def for_record(self, record: dict[str, Any]) -> Toolbox:
        """这道题的工具箱：只有它列着的。"""
        known = self._known(record)
        return Toolbox(known[name] for name in dict.fromkeys(self.names(record)) if name in known)

    def check(self, *datasets: Any) -> None:
        """每道题列着的工具都有人会执行，资料读得懂；``None`` 的数据集跳过。

        Raises:
            UserError: 哪一行列着不会的工具，或哪一行的 ``lookup`` 不成样子。
        """
        for item in (item for dataset in datasets if dataset is not None for item in dataset):
            pages = item["record"].get("lookup")
            if pages is not None and not (
                isinstance(pages, dict) and all(isinstance(page, dict) for page in pages.values())
            ):
                raise UserError(
                    f"是 {dump_json(pages)[:80]}",
                    where=f"{item['source']}:{item['line']} 字段 lookup",
                    expected='{"名字": {"项目": "内容", …}, …}，工具 search 从里面查',
                    fix="改成这个样子，或去掉它",
                )
            known = self._known(item["record"])
            if "" in self.names(item["record"]):
                raise UserError(
                    "列着的一个工具没有名字",
                    where=f"{item['source']}:{item['line']} 字段 tools",
                    expected='{"type": "function", "function": {"name": …, "parameters": …}}',
                    fix="补上 name，或去掉它",
                )
            if missing := [name for name in self.names(item["record"]) if name not in known]:
                raise UserError(
                    f"列着工具 {'、'.join(missing)[:100]}，没有人会执行它",
                    where=f"{item['source']}:{item['line']}",
                    expected="、".join(known),
                    fix="在 --tools 文件.py 里写一个同名的函数，或从数据里去掉它",
                )

    def check_room(self, tokenizer: Any, prompt: int, total: int) -> None:
        """使用者的工具说明写进最长的提示也放得下。

        Raises:
            UserError: 放不下。
        """
        ask = [{"role": "user", "content": "问"}]
        own = [tool.schema() for tool in self.own]
        extra = len(encode_chat(tokenizer, ask, own).ids) - len(encode_chat(tokenizer, ask).ids)
        if prompt + extra >= total:
            raise UserError(
                f"工具的说明另占 {extra} 个 token，与提示的上限 --max_seq_len {prompt} 合起来放不下",
                where=f"--max_total_len {total}",
                expected=f"大于 {prompt + extra}",
                fix="加大它，或把函数的说明写短些",
            )

    def _known(self, record: dict[str, Any]) -> dict[str, Tool]:
        pages = record.get("lookup")
        return self.known | {"search": archive(pages)} if isinstance(pages, dict) else self.known
