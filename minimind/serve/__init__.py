"""OpenAI 兼容的服务：路由在 ``app``，一次请求的始末在 ``chat`` 与 ``completions``，引擎线程在 ``runner``。"""
