// 聊天页的设置；都记在浏览器里，密钥只记到标签页关掉
import { $, openPage } from "./page.js";
import { WORDS } from "./words.js";

export { $, phrase, words } from "./page.js";

const REMEMBERED = ["system", "temperature", "top_p", "repetition_penalty", "max_tokens", "seed", "thinking", "tools", "probabilities", "api_key"];
const storeOf = (id) => (id === "api_key" ? sessionStorage : localStorage);

export function restoreSettings() {
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
  openPage(WORDS);
  showSettings(innerWidth >= 800);
}

export function showSettings(open) {
  $("settings").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
}
