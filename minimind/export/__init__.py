"""走出去的路：Hugging Face 目录、GGUF、LoRA 合并；以及反方向的导入。"""
