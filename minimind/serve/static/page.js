// 各个页面共用：两种语言、明暗，都记在浏览器里；每页自己的话由 openPage 交进来
export const $ = (id) => document.getElementById(id);
export let words = {};
let dictionary = {};
const listeners = []; // 换了语言或明暗之后还要重画的

export function onRestyle(redraw) {
  listeners.push(redraw);
}

export function openPage(all) {
  dictionary = all;
  setLanguage(localStorage.getItem("minimind.language") ?? (navigator.language.startsWith("zh") ? "zh" : "en"));
  setTheme(localStorage.getItem("minimind.theme") ?? "");
}

// 会随语言变的一句话：换语言时重说一遍
export function phrase(node, say) {
  node.say = say;
  node.classList.add("phrase");
  node.textContent = say();
  return node;
}

function setLanguage(language) {
  words = dictionary[language];
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
  for (const redraw of listeners) redraw();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("minimind.theme", theme);
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  $("theme").onclick = () => setTheme(dark ? "light" : "dark");
  for (const redraw of listeners) redraw();
}
