// 与服务器说话：请求、流式的事件、出错怎么说
import { $, words } from "./settings.js";

class ApiError extends Error {
  constructor({ message, code }, status) {
    super(message);
    Object.assign(this, { code, status });
  }
}

export async function request(path, options = {}) {
  const key = $("api_key").value.trim();
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const reply = await fetch(path, { ...options, headers });
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => null); // 中间的代理出错时不是 JSON
  throw new ApiError(body?.error ?? { message: `${reply.status} ${reply.statusText}` }, reply.status);
}

// 逐个给出 data: 行里的 JSON，一行可能分在几次读取里；没等到 [DONE] 就断了，最后给一个 null
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error);
      yield event;
    }
  }
  yield null;
}

export function explain(error) {
  if (error instanceof TypeError) return words.offline; // fetch 连不上时抛的
  return words[`error_${error.code}`] ?? words[`error_${error.status}`] ?? error.message;
}
