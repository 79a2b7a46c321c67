"""看训练的页面：只读 ``{save_dir}/logs`` 里的文件。读在 ``tail`` 与 ``history``，路由在 ``app``，网页在 ``static``。"""
