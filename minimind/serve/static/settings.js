// 设置、语言、明暗；都记在浏览器里，密钥只记到标签页关掉
import { WORDS } from "./words.js";

export const $ = (id) => document.getElementById(id);
export let words = WORDS.zh;

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
  setLanguage(localStorage.getItem("minimind.language") ?? (navigator.language.startsWith("zh") ? "zh" : "en"));
  setTheme(localStorage.getItem("minimind.theme") ?? "");
  showSettings(innerWidth >= 800);
}

export function showSettings(open) {
  $("settings").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
}

// 会随语言变的一句话：换语言时重说一遍
export function phrase(node, say) {
  node.say = say;
  node.classList.add("phrase");
  node.textContent = say();
  return node;
}

function setLanguage(language) {
  words = WORDS[language];
  localStorage.setItem("minimind.language", language);
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = words[node.dataset.text];
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = words[node.dataset.placeholder];
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", words[node.dataset.label]);
    if (node.localName === "button") node.title = words[node.dataset.label];
  }
  for (const node of document.querySelectorAll(".phrase")) node.textContent = node.say();
  $("language").textContent = language === "zh" ? "EN" : "中文";
  $("language").lang = language === "zh" ? "en" : "zh-CN";
  $("language").onclick = () => setLanguage(language === "zh" ? "en" : "zh");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("minimind.theme", theme);
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  $("theme").onclick = () => setTheme(dark ? "light" : "dark");
}
