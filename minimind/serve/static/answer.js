// 一条消息在页面上的样子：流式的一段段加上去，存下的一次放好，走同一条路
import { $, phrase, words } from "./settings.js";
import { tokenSpan } from "./tokens.js";

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

const label = (say) => phrase(element("span", "label"), say);

// 读的人停在末尾才跟着往下走；往上翻了就不拉他
export function stickToEnd(change) {
  const box = $("scroll");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function addMessage(role, say) {
  const node = element("li", role);
  node.append(phrase(element("span", "who"), say));
  stickToEnd(() => $("messages").append(node));
  return node;
}

export function addUser(text) {
  addMessage("user", () => words.you).append(element("div", "body", text));
  $("scroll").scrollTop = $("scroll").scrollHeight; // 自己刚问的总要看得到
}

export class Answer {
  constructor() {
    this.node = addMessage("assistant", () => words.model_says);
    this.node.ariaBusy = "true"; // 读屏等写完再念
    this.message = { role: "assistant", content: "" };
    this.calls = [];
    this.callNodes = [];
    this.tokens = 0;
    this.reason = null;
    this.start = performance.now();
  }

  static show(message) {
    const answer = new Answer();
    answer.add({ delta: { ...message, tool_calls: (message.tool_calls ?? []).map((call, index) => ({ ...call, index })) } });
    answer.node.ariaBusy = "false";
    return answer;
  }

  section(name, make) {
    this[name] ??= make();
    return this[name];
  }

  add(choice) {
    const { delta, logprobs } = choice;
    const details = logprobs?.content ?? [];
    this.tokens += details.length || (delta.content || delta.reasoning_content ? 1 : 0);
    stickToEnd(() => {
      if (delta.reasoning_content) this.addThought(delta.reasoning_content, details);
      if (delta.content) this.addText(delta.content, details);
      for (const piece of delta.tool_calls ?? []) this.addCall(piece);
    });
    if (choice.finish_reason) this.reason = choice.finish_reason;
  }

  addThought(text, details) {
    this.message.reasoning_content = (this.message.reasoning_content ?? "") + text;
    this.section("thought", () => {
      const box = element("details", "thought");
      box.open = true;
      const body = element("div", "");
      box.append(phrase(element("summary", ""), () => words.thought), body);
      this.node.append(box);
      return body;
    });
    this.append(this.thought, text, details);
  }

  addText(text, details) {
    if (!this.message.content) this.foldThought(); // 开始作答就折起来
    this.message.content += text;
    this.append(this.section("body", () => this.node.appendChild(element("div", "body"))), text, details);
  }

  append(body, text, details) {
    const piece = tokenSpan(text, details);
    if (piece.details && !this.node.querySelector('.body .token[tabindex="0"]')) {
      for (const token of this.node.querySelectorAll('.token[tabindex="0"]')) token.tabIndex = -1;
      piece.tabIndex = 0;
    }
    body.append(piece);
  }

  addCall({ index, id, function: part }) {
    if (!this.calls[index]) {
      this.foldThought();
      this.calls[index] = { id, type: "function", function: { name: part.name, arguments: "" } };
      const node = this.node.appendChild(element("div", "call"));
      this.callNodes[index] = element("code", "");
      node.append(label(() => words.calling), this.callNodes[index]);
    }
    const call = this.calls[index].function;
    call.arguments += part.arguments ?? "";
    this.callNodes[index].textContent = `${call.name}(${call.arguments})`;
  }

  addResult(text) {
    const node = element("div", "call");
    node.append(label(() => words.result), element("code", "", text));
    stickToEnd(() => this.node.insertBefore(node, this.meta ?? null));
  }

  addError(say) {
    this.node.classList.add("error");
    this.node.ariaBusy = "false";
    stickToEnd(() => this.node.append(phrase(element("div", "body"), say)));
  }

  foldThought() {
    if (this.thought) this.thought.parentElement.open = false;
  }

  // note：怎么停下的，没有就是写完了
  finish(note) {
    if (note) this.calls = []; // 没写完的调用不执行，也不进历史
    if (this.calls.length) this.message.tool_calls = this.calls;
    this.node.ariaBusy = "false";
    const { tokens, reason } = this;
    const speed = ((1000 * tokens) / (performance.now() - this.start)).toFixed(1);
    const say = () => [words.speed(tokens, speed), reason === "length" ? words.cut : "", note?.() ?? ""].filter(Boolean).join(" · ");
    this.meta = phrase(element("div", "meta"), say);
    stickToEnd(() => this.node.append(this.meta));
  }
}
