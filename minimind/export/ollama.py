"""GGUF 旁边的 Modelfile：``ollama create 名字 -f Modelfile`` 即可。

Ollama 用 Go 的模板而不是 Jinja；这里与 chat_template.jinja 写出同样的回合布局。唯一的差别：Go 把工具与参数写成紧凑的
JSON（``{"a":1}``），训练时见到的是冒号逗号后有空格的（``{"a": 1}``）。
"""

from __future__ import annotations

from pathlib import Path

from minimind.export.source import Source
from minimind.tokenizer.layouts import OURS
from minimind.tokenizer.render import TOOLS_HEAD, TOOLS_TAIL
from minimind.tokenizer.templates import layout_of

CHAT = """\
{{- if or .System .Tools }}<|im_start|>system
{{ .System }}
{{- if .Tools }}{{ if .System }}

{{ end }}@HEAD@
{{ range $i, $tool := .Tools }}{{ if $i }}
{{ end }}{{ json $tool }}
{{- end }}@TAIL@
{{- end }}<|im_end|>
{{ end }}
{{- $open := false }}
{{- range $i, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if and $open (ne .Role "tool") }}<|im_end|>
{{ $open = false }}{{ end }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if .Thinking }}<think>
{{ .Thinking }}
</think>

{{ end }}{{ .Content }}
{{- range $k, $call := .ToolCalls }}{{ if or $k $message.Content }}
{{ end }}<tool_call>
{"name": {{ json $call.Function.Name }}, "arguments": {{ json $call.Function.Arguments }}}
</tool_call>
{{- end }}{{ if not $last }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}
{{- if $open }}
{{ else }}<|im_start|>user
{{ end }}<tool_response>
{{ .Content }}
</tool_response>{{ $open = true }}{{ if $last }}<|im_end|>
{{ end }}
{{- end }}
{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ if and $.IsThinkSet (not $.Think) }}<think>

</think>

{{ else if and $.IsThinkSet $.Think }}<think>
{{ end }}
{{- end }}
{{- end }}"""

PLAIN = "{{ .Prompt }}"
# 别人的模板只有 Jinja 的，写成 Go 的要人来做；写错的比没有的坏
OTHERS = (
    "# 对话模板是模型自己的（Jinja，在 GGUF 里）。Ollama 认不出它时，照它写一个 Go 的 TEMPLATE 放在这里\n"
)


def modelfile(source: Source, gguf_name: str, context: int = 2048) -> str:
    """Modelfile 的全文。

    Args:
        gguf_name: 同目录的 GGUF 文件名。
        context: 上下文长度；Ollama 会按它预留显存。
    """
    template = PLAIN
    if not source.plain and layout_of(source.tokenizer) != OURS:
        return _modelfile(source, gguf_name, context, OTHERS)
    if not source.plain:
        template = CHAT.replace("@HEAD@", TOOLS_HEAD.rstrip("\n")).replace("@TAIL@", TOOLS_TAIL)
    return _modelfile(source, gguf_name, context, f'TEMPLATE """{template}"""\n')


def _modelfile(source: Source, gguf_name: str, context: int, template: str) -> str:
    by_id = {token_id: token for token, token_id in source.tokenizer.get_vocab().items()}
    stops = "".join(f'PARAMETER stop "{by_id[token_id]}"\n' for token_id in source.stop_ids)
    return (
        f"FROM ./{gguf_name}\n"
        f"{template}"
        f"PARAMETER num_ctx {context}\n"
        "PARAMETER temperature 0.85\n"
        "PARAMETER top_p 0.85\n"
        "PARAMETER repeat_penalty 1.0\n"
        f"{stops}"
    )


def modelfile_path(gguf: Path) -> Path:
    """``模型.gguf`` 旁边的 ``模型.Modelfile``：一个目录里可以放几种精度。"""
    return gguf.with_suffix(".Modelfile")
