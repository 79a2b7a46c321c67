// 词元的概率：指着看、用方向键走着看
import { $, words } from "./settings.js";

// 一段文字与写出它的词元；没有概率就是普通文字
export function tokenSpan(text, details) {
  if (!details.length) return document.createTextNode(text);
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = text;
  span.tabIndex = -1;
  span.details = details;
  return span;
}

// 空白看得见；不成字的字节写成十六进制
function visible({ token, bytes }) {
  if (token.includes("\ufffd")) return bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
  return token.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
}

function candidates(token) {
  const body = document.createElement("tbody");
  const listed = token.top_logprobs.some((other) => other.token === token.token);
  for (const other of listed ? token.top_logprobs : [...token.top_logprobs, token]) {
    const share = Math.exp(other.logprob);
    const row = body.insertRow();
    const chosen = other.token === token.token;
    row.className = chosen ? "chosen" : "";
    row.insertCell().textContent = visible(other);
    row.insertCell().textContent = share < 0.0005 ? "<0.1%" : `${(100 * share).toFixed(1)}%`;
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${(5 * share).toFixed(2)}em`;
    row.insertCell().append(bar);
    row.insertCell().textContent = chosen ? words.chosen : "";
  }
  return body;
}

function showTip(span) {
  const tip = $("tip");
  const table = document.createElement("table");
  table.append(...span.details.map(candidates));
  tip.replaceChildren(table);
  tip.hidden = false;
  span.setAttribute("aria-describedby", "tip");
  const place = span.getClientRects()[0];
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  const below = place.bottom + 6;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? Math.max(8, place.top - tip.offsetHeight - 6) : below}px`;
}

function hideTip(event) {
  event?.target.removeAttribute?.("aria-describedby");
  $("tip").hidden = true;
}

// 一条回答只占一个 Tab 站，里面用方向键走
function walk(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !event.target.details) return;
  event.preventDefault();
  const tokens = [...event.target.closest("li").querySelectorAll(".token")].filter((token) => token.checkVisibility?.() ?? true);
  tokens[tokens.indexOf(event.target) + step]?.focus();
}

export function watchTokens(list, scroller) {
  for (const [enter, leave] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    list.addEventListener(enter, (event) => event.target.details && showTip(event.target));
    list.addEventListener(leave, hideTip);
  }
  list.addEventListener("focusin", ({ target }) => {
    if (!target.details) return;
    for (const token of target.closest("li").querySelectorAll('.token[tabindex="0"]')) token.tabIndex = -1;
    target.tabIndex = 0;
  });
  list.addEventListener("keydown", walk);
  scroller.addEventListener("scroll", () => hideTip());
}
