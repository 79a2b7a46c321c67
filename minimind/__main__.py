"""``python -m minimind``：与 ``minimind`` 命令相同，脚本目录不在 PATH 上时用它。"""

from minimind.launch import main

if __name__ == "__main__":
    main()
