"""``--allowed_hosts`` 怎么写：聊天的服务与看训练的页面共用。"""

import pytest

pytest.importorskip("fastapi")

from minimind.errors import UserError
from minimind.serve.cli import check_address
from minimind.serve.hosts import parse_hosts, unknown_host
from minimind.watch import cli as watch


def test_写对的都认():
    names = parse_hosts("lab.example.com, [::1]:80 ,10.0.0.1,my_host:8000")
    assert names == ("lab.example.com", "[::1]:80", "10.0.0.1", "my_host:8000")
    assert unknown_host("lab.example.com:8999", "127.0.0.1", names) is None
    assert unknown_host("my_host", "127.0.0.1", names) is None
    assert parse_hosts(None) == () and parse_hosts("*") == ("*",)


@pytest.mark.parametrize(
    "text", [" , ", ",", "https://x.com", "x.com/路径", "*.x.com", "实验室", "a.com,b c", "a@b"]
)
def test_写成网址_通配的一部分_空的_当场说清_不是收下而谁也不认(text, capsys):
    with pytest.raises(UserError, match="--allowed_hosts"):
        parse_hosts(text)
    assert watch.main(["--port", "0", "--allowed_hosts", text]) == 2
    assert "主机名" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["a" * 300, "a..b"])
def test_主机名有一段太长或是空的_是一句话(host):
    with pytest.raises(UserError, match="不能在"):
        check_address(host, 0)
