"""命令行对话：``python eval_llm.py --weight full_sft --device cuda:0``；正文在 minimind/chat.py。"""

from minimind.launch import launch

if __name__ == "__main__":
    launch("minimind.chat:main")
