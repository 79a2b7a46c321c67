// 页面上的话，两种语言
export const WORDS = {
  zh: {
    settings: "设置", model: "模型", clear: "清空", theme: "明暗", system: "系统提示", temperature: "温度（0 为最稳）",
    top_p: "top-p", repetition: "重复惩罚", max_tokens: "最多写多少词元", seed: "随机种子", random: "每次不同",
    thinking: "思考", think_auto: "由模型决定", think_on: "先想再答", think_off: "直接答", tools: "带上示例工具（计算器、时钟）",
    probabilities: "指着词看它的概率", api_key: "密钥（服务器要求时）", ask: "问点什么……", send: "发送", stop: "停止",
    keys: "回车发送，Shift+回车换行，Esc 停止，/ 回到输入框；在回答里用左右方向键逐词看。", thought: "思考过程", calling: "调用", result: "结果",
    you: "你", model_says: "模型", stopped: "已停止", cut: "写到上限为止", broken: "连接断了，没有写完", waiting: "正在写……",
    speed: (n, s) => `${n} 个词元，${s} 词元/秒`, chosen: "写的这个", rounds: "工具调用到了轮数上限",
    welcome: "这里是你自己的模型。问点什么；指着回答里的词，看它当时还想写哪些。",
    offline: "连不上服务器", error_401: "服务器要密钥：请在左侧设置里填对", error_429: "排队的人太多，过一会儿再试",
    error_loading: "模型还在载入，稍等", error_shutting_down: "服务器正在停机", error_timeout: "写得太久，超过了服务器的时限",
  },
  en: {
    settings: "Settings", model: "Model", clear: "Clear", theme: "Theme", system: "System prompt", temperature: "Temperature (0 = greedy)",
    top_p: "top-p", repetition: "Repetition penalty", max_tokens: "Max tokens", seed: "Seed", random: "random",
    thinking: "Thinking", think_auto: "let the model decide", think_on: "think first", think_off: "answer directly", tools: "Offer sample tools (calculator, clock)",
    probabilities: "Hover a token for its probability", api_key: "API key (if required)", ask: "Ask something…", send: "Send", stop: "Stop",
    keys: "Enter sends, Shift+Enter breaks the line, Esc stops, / focuses the input; arrow keys walk the tokens of an answer.", thought: "Reasoning", calling: "Call", result: "Result",
    you: "You", model_says: "Model", stopped: "stopped", cut: "hit the length limit", broken: "connection lost before the end", waiting: "Writing…",
    speed: (n, s) => `${n} tokens, ${s} tokens/s`, chosen: "chosen", rounds: "Tool round limit reached",
    welcome: "This is your own model. Ask something; point at a word of the answer to see what else it considered.",
    offline: "Cannot reach the server", error_401: "The server wants an API key: fill it in under Settings", error_429: "Too many requests are queued, try again shortly",
    error_loading: "The model is still loading", error_shutting_down: "The server is shutting down", error_timeout: "The answer took longer than the server allows",
  },
};
