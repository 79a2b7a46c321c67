"""几种自己会渲染的布局：同样的 ChatML 骨架，工具说明、思考块与调用的写法不同。

一个分词器用哪一种，由它的对话模板渲染出什么决定（:mod:`minimind.tokenizer.templates`）；
哪一种都不是的，交给它自己的 Jinja 模板。新的布局：在这里加一项，放进 :data:`LAYOUTS`。
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """一种布局。

    Args:
        tools_head, tools_tail: 工具说明的首尾，其间每行一个工具；``tools_tail`` 里的标签是真的标签。
        always_think: 助手回合总有思考块：没有推理的是空块，正文里的 ``<think>`` 也归进去；
            提示默认关着思考。假则有 ``reasoning_content`` 才有块，提示由模型决定。
        literal_calls: 调用照抄：名字不转义，字符串的参数原样。假则写成规整的 JSON。
        joined: 相邻的文字连起来分词，id 与“渲染成全文再分词”的相同；假则逐段分词。
    """

    name: str
    tools_head: str
    tools_tail: str
    always_think: bool = False
    literal_calls: bool = False
    joined: bool = False


OURS = Layout(
    "minimind",
    "# 工具\n\n下面每行是一个可以调用的工具，用 JSON Schema 描述：\n",
    '\n\n需要工具时，每次调用写一个 JSON 对象 {"name": 工具名, "arguments": {参数名: 值}}，'
    "放在工具调用标签里；结果会在下一回合给出。",
)

# 公共项目 minimind-3 的权重在这种布局里训练，工具说明是 Qwen 的那一段，一个字也不能变
PUBLIC_V3 = Layout(
    "minimind-3",
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    always_think=True,
    literal_calls=True,
    joined=True,
)

LAYOUTS = (OURS, PUBLIC_V3)
