// 聊天页：对话的来回、按键与按钮；不依赖任何外部文件
import { Answer, addUser } from "./answer.js";
import { events, explain, request } from "./api.js";
import { $, phrase, restoreSettings, showSettings, words } from "./settings.js";
import { watchTokens } from "./tokens.js";
import { SCHEMAS, runTool } from "./tools.js";

const MAX_ROUNDS = 4;
let talk = []; // 发给服务器的历史；清空时换一个新的，还在写的那条就进不来了
let controller = null;
let retry = 0;

const status = (say) => phrase($("status"), say);

async function loadModels() {
  clearTimeout(retry);
  try {
    const body = await (await request("/v1/models")).json();
    $("model").replaceChildren(...body.data.map((model) => new Option(model.id, model.id)));
    status(() => "");
  } catch (error) {
    status(() => explain(error));
    if (error.status === 401) showSettings(true);
    else retry = setTimeout(loadModels, 2000); // 密钥不对时等人来改，别的过会儿再试
  }
}

// ---------------------------------------------------------------- 对话

// 刷新页面不丢，关掉标签页就没了；逐词概率太大，不存
function save() {
  sessionStorage.setItem("minimind.talk", JSON.stringify(talk));
}

function restoreTalk() {
  talk = JSON.parse(sessionStorage.getItem("minimind.talk") ?? "[]");
  let answer = null;
  for (const message of talk) {
    if (message.role === "user") addUser(message.content);
    else if (message.role === "tool") answer.addResult(message.content);
    else answer = Answer.show(message);
  }
}

function requestBody(messages) {
  const system = $("system").value.trim();
  const body = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
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

// 一轮回答；出了错返回 null
async function oneAnswer(messages, signal) {
  const answer = new Answer();
  try {
    const reply = await request("/v1/chat/completions", { method: "POST", body: JSON.stringify(requestBody(messages)), signal });
    let broken = false;
    for await (const event of events(reply.body)) {
      if (event === null) broken = true;
      else for (const choice of event.choices) answer.add(choice);
    }
    answer.finish(broken ? () => words.broken : undefined);
  } catch (error) {
    if (error.name !== "AbortError") {
      answer.addError(() => explain(error));
      return null;
    }
    answer.finish(() => words.stopped);
  }
  messages.push(answer.message);
  return answer;
}

async function ask(text) {
  const mine = talk;
  const before = mine.length;
  mine.push({ role: "user", content: text });
  addUser(text);
  controller = new AbortController();
  const { signal } = controller;
  setBusy(true);
  let note = () => "";
  for (let round = 1; ; round++) {
    const answer = await oneAnswer(mine, signal);
    if (!answer) {
      mine.length = before; // 出错的这一问不进历史，文字还给输入框
      $("input").value ||= text;
      break;
    }
    if (!answer.calls.length) break;
    for (const call of answer.calls) {
      const result = runTool(call.function.name, call.function.arguments);
      answer.addResult(result);
      mine.push({ role: "tool", tool_call_id: call.id, content: result });
    }
    if (round > MAX_ROUNDS) {
      note = () => words.rounds;
      break;
    }
  }
  controller = null;
  setBusy(false);
  status(note);
  save();
}

function setBusy(busy) {
  const lost = document.activeElement === $(busy ? "send" : "stop"); // 按钮一藏，焦点就丢了
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (lost) $("input").focus();
  status(() => (busy ? words.waiting : ""));
}

// ---------------------------------------------------------------- 操作

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || controller) return;
  $("input").value = "";
  ask(text);
});
// 输入法选字时的回车与 Esc 归输入法；Safari 在选完之后才送这个键，只有 229 认得出
const composing = (event) => event.isComposing || event.keyCode === 229;
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !composing(event)) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !composing(event)) {
    if (controller) controller.abort();
    else if (matchMedia("(max-width: 40rem)").matches) showSettings(false);
  }
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("input").focus();
  }
});
$("stop").addEventListener("click", () => controller?.abort());
$("clear").addEventListener("click", () => {
  controller?.abort();
  talk = [];
  save();
  $("messages").replaceChildren();
  $("input").focus();
});
$("menu").addEventListener("click", () => showSettings($("settings").hidden));
$("api_key").addEventListener("change", loadModels);

restoreSettings();
watchTokens($("messages"), $("scroll"));
restoreTalk();
loadModels();
