"""控制 token：名字、顺序、谁能变成单个 token。"""

from __future__ import annotations

PAD = "<|endoftext|>"  # id 0
IM_START = "<|im_start|>"  # id 1，也是预训练文档的开头
IM_END = "<|im_end|>"  # id 2，也是预训练文档的结尾
CONTROLS = (PAD, IM_START, IM_END)

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, END_TOOL_RESPONSE = "<tool_response>", "</tool_response>"
TAGS = (
    *(THINK, END_THINK, ANSWER, END_ANSWER),
    *(TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE),
)

# 助手正文里出现这些标签时是可信的，变成单个 token；
# tool_response 不在内：工具结果只由结构产生，助手不能自己写一段假的
REPLY_TAGS = TAGS[:6]

RESERVED = tuple(f"<|reserved_{i}|>" for i in range(5))

# 顺序即 id。tags 不设 special 标志，decode(skip_special_tokens=True) 会留下它们，供对话与服务端解析
SPECIAL_TOKENS = (*CONTROLS, *TAGS, *RESERVED)
