// 聊天页：流式显示、思考折叠、工具调用、逐词概率；不依赖任何外部文件
import { WORDS } from "./words.js";
import { SCHEMAS, runTool } from "./tools.js";

const $ = (id) => document.getElementById(id);
const MAX_ROUNDS = 4;
let words = WORDS.zh;
let history = [];
let controller = null;

// ---------------------------------------------------------------- 设置

const REMEMBERED = ["system", "temperature", "top_p", "repetition_penalty", "max_tokens", "seed", "thinking", "tools", "probabilities", "api_key"];
const storeOf = (id) => (id === "api_key" ? sessionStorage : localStorage);

function restore() {
  for (const id of REMEMBERED) {
    const saved = storeOf(id).getItem(`minimind.${id}`);
    const field = $(id);
    if (saved !== null) field.type === "checkbox" ? (field.checked = saved === "1") : (field.value = saved);
    const show = () => {
      const output = field.parentElement.querySelector("output");
      if (output) output.value = field.value;
      storeOf(id).setItem(`minimind.${id}`, field.type === "checkbox" ? (field.checked ? "1" : "0") : field.value);
    };
    field.addEventListener("input", show);
    show();
  }
  setLanguage(localStorage.getItem("minimind.language") ?? (navigator.language.startsWith("zh") ? "zh" : "en"));
  setTheme(localStorage.getItem("minimind.theme") ?? "");
}

function setLanguage(language) {
  words = WORDS[language];
  localStorage.setItem("minimind.language", language);
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = words[node.dataset.text];
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = words[node.dataset.placeholder];
  for (const node of document.querySelectorAll("[data-label]")) node.title = node.ariaLabel = words[node.dataset.label];
  $("language").textContent = language === "zh" ? "EN" : "中文";
  $("language").onclick = () => setLanguage(language === "zh" ? "en" : "zh");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("minimind.theme", theme);
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  $("theme").onclick = () => setTheme(dark ? "light" : "dark");
}

const headers = () => {
  const key = $("api_key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

async function loadModels() {
  try {
    const reply = await fetch("/v1/models", { headers: headers() });
    const body = await reply.json();
    if (!reply.ok) throw new Error(body.error.message);
    $("model").replaceChildren(...body.data.map((model) => new Option(model.id, model.id)));
    $("status").textContent = "";
  } catch (error) {
    $("status").textContent = error instanceof TypeError ? words.offline : error.message;
    setTimeout(loadModels, 2000);
  }
}

// ---------------------------------------------------------------- 消息

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function addMessage(role) {
  const node = element("li", role);
  $("messages").append(node);
  return node;
}

function scrollDown() {
  const list = $("messages");
  list.scrollTop = list.scrollHeight;
}

// 一条正在写的回答
class Answer {
  constructor() {
    this.node = addMessage("assistant");
    this.message = { role: "assistant", content: "" };
    this.calls = [];
    this.tokens = 0;
    this.reason = null;
    this.start = performance.now();
  }

  section(name, make) {
    this[name] ??= make();
    return this[name];
  }

  add(choice) {
    const { delta, logprobs } = choice;
    const details = logprobs?.content ?? [];
    this.tokens += details.length || (delta.content || delta.reasoning_content ? 1 : 0);
    if (delta.reasoning_content) {
      this.message.reasoning_content = (this.message.reasoning_content ?? "") + delta.reasoning_content;
      this.section("thought", () => {
        const box = element("details", "thought");
        box.open = true;
        const text = element("div", "");
        box.append(element("summary", "", words.thought), text);
        this.node.append(box);
        return text;
      }).append(tokenSpan(delta.reasoning_content, details));
    }
    if (delta.content) {
      if (this.thought && !this.message.content) this.thought.parentElement.open = false; // 开始作答就折起来
      this.message.content += delta.content;
      this.section("body", () => this.node.appendChild(element("div", "body"))).append(tokenSpan(delta.content, details));
    }
    for (const piece of delta.tool_calls ?? []) {
      const call = (this.calls[piece.index] ??= { id: piece.id, type: "function", function: { name: piece.function.name, arguments: "" } });
      call.node ??= this.node.appendChild(element("div", "call"));
      call.function.arguments += piece.function.arguments ?? "";
      call.node.textContent = `${words.calling} ${call.function.name}(${call.function.arguments})`;
    }
    if (choice.finish_reason) this.reason = choice.finish_reason;
    scrollDown();
  }

  finish(note = "") {
    if (this.calls.length) this.message.tool_calls = this.calls.map(({ node, ...call }) => call);
    const seconds = (performance.now() - this.start) / 1000;
    const notes = [words.speed(this.tokens, (this.tokens / seconds).toFixed(1)), this.reason === "length" ? words.cut : "", note];
    this.node.append(element("div", "meta", notes.filter(Boolean).join(" · ")));
  }
}

// 一段文字与写出它的词元；没有概率就是普通文字
function tokenSpan(text, details) {
  if (!details.length) return document.createTextNode(text);
  const span = element("span", "token", text);
  span.tabIndex = 0;
  span.details = details;
  return span;
}

// ---------------------------------------------------------------- 概率提示

function showTip(span) {
  const tip = $("tip");
  const table = document.createElement("table");
  for (const token of span.details) {
    const others = token.top_logprobs.some((other) => other.token === token.token) ? token.top_logprobs : [token, ...token.top_logprobs];
    for (const other of others) {
      const share = Math.exp(other.logprob);
      const row = table.insertRow();
      row.insertCell().textContent = JSON.stringify(other.token);
      row.insertCell().textContent = `${(100 * share).toFixed(1)}%`;
      const bar = element("span", "bar");
      bar.style.width = `${(4 * share).toFixed(2)}em`;
      row.insertCell().append(bar);
      row.insertCell().textContent = other.token === token.token ? `← ${words.chosen}` : "";
    }
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  const place = span.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  const below = place.bottom + 6;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? place.top - tip.offsetHeight - 6 : below}px`;
}

for (const [enter, leave] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  $("messages").addEventListener(enter, (event) => event.target.details && showTip(event.target));
  $("messages").addEventListener(leave, () => ($("tip").hidden = true));
}

// ---------------------------------------------------------------- 请求

function requestBody() {
  const system = $("system").value.trim();
  const body = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    stream: true,
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    repetition_penalty: Number($("repetition_penalty").value),
    max_tokens: Number($("max_tokens").value),
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  if ($("thinking").value !== "") body.enable_thinking = $("thinking").value === "1";
  if ($("tools").checked) body.tools = SCHEMAS;
  if ($("probabilities").checked) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return body;
}

// 逐个给出 data: 行里的 JSON；一行可能分在几次读取里
async function* events(stream) {
  let rest = "";
  for await (const text of stream.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function oneAnswer() {
  const answer = new Answer();
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(requestBody()), signal: controller.signal,
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) answer.add(choice);
    }
    answer.finish();
  } catch (error) {
    if (error.name === "AbortError") answer.finish(words.stopped);
    else {
      answer.node.classList.add("error");
      answer.node.append(element("div", "", error instanceof TypeError ? words.offline : error.message));
      return null;
    }
  }
  history.push(answer.message);
  return answer;
}

async function ask(text) {
  history.push({ role: "user", content: text });
  addMessage("user").append(element("div", "body", text));
  scrollDown();
  setBusy(true);
  controller = new AbortController();
  for (let round = 0; ; round++) {
    const answer = await oneAnswer();
    if (!answer?.calls.length || controller.signal.aborted) break;
    if (round === MAX_ROUNDS) {
      $("status").textContent = words.rounds;
      break;
    }
    for (const call of answer.calls) {
      const result = runTool(call.function.name, call.function.arguments);
      answer.node.append(element("div", "call", `${words.result} ${result}`));
      history.push({ role: "tool", tool_call_id: call.id, content: result });
    }
  }
  setBusy(false);
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("status").textContent = busy ? words.waiting : "";
  if (!busy) controller = null;
}

// ---------------------------------------------------------------- 操作

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || controller) return;
  $("input").value = "";
  ask(text);
});
$("input").addEventListener("keydown", (event) => {
  // 输入法选字时的回车不是发送
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") controller?.abort();
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("input").focus();
  }
});
$("stop").addEventListener("click", () => controller?.abort());
$("clear").addEventListener("click", () => {
  controller?.abort();
  history = [];
  $("messages").replaceChildren();
  $("input").focus();
});
$("menu").addEventListener("click", () => {
  const settings = $("settings");
  settings.hidden = !settings.hidden;
  $("menu").ariaExpanded = String(!settings.hidden);
});
$("api_key").addEventListener("change", loadModels);

restore();
$("settings").hidden = innerWidth < 800;
loadModels();
