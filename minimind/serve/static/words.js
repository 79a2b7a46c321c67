// 页面上的话，两种语言
export const WORDS = {
  zh: {
    settings: "设置", model: "模型", clear: "清空", theme: "明暗", system: "系统提示", temperature: "温度（0 为最稳）",
    top_p: "top-p", repetition: "重复惩罚", max_tokens: "最多写多少词元", seed: "随机种子", random: "每次不同",
    thinking: "思考", think_auto: "由模型决定", think_on: "先想再答", think_off: "直接答", tools: "带上示例工具（计算器、时钟）",
    probabilities: "指着词看它的概率", api_key: "密钥（服务器要求时）", ask: "问点什么……", send: "发送", stop: "停止",
    keys: "回车发送，Shift+回车换行，Esc 停止，/ 回到输入框。", thought: "思考过程", calling: "调用", result: "结果",
    you: "你", stopped: "已停止", cut: "写到上限为止", speed: (n, s) => `${n} 个词元，${s} 词元/秒`, waiting: "正在写……",
    offline: "连不上服务器", chosen: "写的这个", rounds: "工具调用到了轮数上限",
  },
  en: {
    settings: "Settings", model: "Model", clear: "Clear", theme: "Theme", system: "System prompt", temperature: "Temperature (0 = greedy)",
    top_p: "top-p", repetition: "Repetition penalty", max_tokens: "Max tokens", seed: "Seed", random: "random",
    thinking: "Thinking", think_auto: "let the model decide", think_on: "think first", think_off: "answer directly", tools: "Offer sample tools (calculator, clock)",
    probabilities: "Hover a token for its probability", api_key: "API key (if required)", ask: "Ask something…", send: "Send", stop: "Stop",
    keys: "Enter sends, Shift+Enter breaks the line, Esc stops, / focuses the input.", thought: "Reasoning", calling: "Call", result: "Result",
    you: "You", stopped: "stopped", cut: "hit the length limit", speed: (n, s) => `${n} tokens, ${s} tokens/s`, waiting: "Writing…",
    offline: "Cannot reach the server", chosen: "chosen", rounds: "Tool round limit reached",
  },
};
