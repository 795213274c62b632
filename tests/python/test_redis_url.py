"""What a program gives as ``redis_client``: a URL, or a client of redis-py, which is only asked where its server is."""

from __future__ import annotations

from typing import Any

import pytest

from safe_broadcaster import ConfigError, EventBroadcaster
from safe_broadcaster.hub.redis_url import redis_settings


class Connection: ...


class SSLConnection(Connection): ...


class UnixDomainSocketConnection(Connection): ...


class Pool:
    def __init__(self, kind: type[Connection], kwargs: dict[str, Any]) -> None:
        self.connection_class = kind
        self.connection_kwargs = kwargs


class Client:
    """As redis-py's, as far as it is looked at."""

    def __init__(self, kind: type[Connection] = Connection, **kwargs: Any) -> None:
        self.connection_pool = Pool(kind, kwargs)


class Manager:
    def __init__(self, *sentinels: Client) -> None:
        self.sentinels = sentinels


class SentinelPool(Pool):
    """As redis-py's, of ``Sentinel(…).master_for("main")``."""

    def __init__(self, *sentinels: Client, is_master: bool = True, **kwargs: Any) -> None:
        super().__init__(Connection, kwargs)
        self.is_master = is_master
        self.service_name = "main"
        self.sentinel_manager = Manager(*sentinels)


def by_sentinels(*sentinels: Client, **more: Any) -> Client:
    client = Client()
    client.connection_pool = SentinelPool(*sentinels, **more)
    return client


class Cluster:
    nodes_manager = None


class Wrapper:
    def __init__(self, client: Client) -> None:
        self._client = client


@pytest.mark.parametrize(
    ("client", "url"),
    [
        (Client(host="db", port=7000, db=3), "redis://db:7000/3"),
        (Client(), "redis://localhost:6379/0"),
        (Client(host="::1", db=None), "redis://[::1]:6379/0"),
        (Client(host="db", password="p@ss/word"), "redis://:p%40ss%2Fword@db:6379/0"),
        (Client(host="db", username="u:r", password="x"), "redis://u%3Ar:x@db:6379/0"),
        (Client(SSLConnection, host="db", ssl_cert_reqs="required"), "rediss://db:6379/0"),
        (Client(UnixDomainSocketConnection, path="/run/a b.sock"), "redis+unix:///run/a%20b.sock"),
        (Client(UnixDomainSocketConnection, path="/r.sock", db=2, password="x"), "redis+unix:///r.sock?db=2&pass=x"),
        (Wrapper(Client(host="db")), "redis://db:6379/0"),
        (by_sentinels(Client(host="a", port=1), Client(host="::1")), "redis+sentinel://a:1,[::1]:26379/main/0"),
        (
            by_sentinels(Client(host="a", username="s", password="y/z"), username="u", password="x@", db=2),
            "redis+sentinel://u:x%40@a:26379/main/2?sentinel_username=s&sentinel_password=y%2Fz",
        ),
    ],
)
def test_a_client_tells_where_its_server_is(client: object, url: str) -> None:
    assert redis_settings(client) == {"redis_url": url}


def test_none_and_urls_pass_and_a_ca_is_kept() -> None:
    assert redis_settings(None) == {}
    assert redis_settings("redis://h") == {"redis_url": "redis://h"}
    client = Client(SSLConnection, host="db", ssl_ca_certs="/ca.pem")
    assert redis_settings(client) == {"redis_url": "rediss://db:6379/0", "redis_ca": "/ca.pem"}


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (object(), "no connection_pool"),
        (7, "<int>"),
        (Cluster(), "redis\\+cluster://"),
        (by_sentinels(Client(host="a"), is_master=False, password="s3cret"), "master_for"),
        (Client(credential_provider=object(), password="s3cret"), "credential_provider"),
        (Client(SSLConnection, ssl_certfile="/c.pem", password="s3cret"), "ssl_certfile"),
        (Client(SSLConnection, ssl_cert_reqs="none", password="s3cret"), "redis_ca"),
    ],
)
def test_what_cannot_be_understood_is_refused_without_its_password(client: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        EventBroadcaster(client)
    assert "s3cret" not in str(caught.value)
    assert "redis_client=" in str(caught.value)


async def test_a_url_that_is_none_is_refused_without_its_password() -> None:
    for wrong in ("http://:s3cret@host", "", "redis://:s3cret@host/x"):
        with pytest.raises(ConfigError, match="redis_client is no URL of a Redis") as caught:
            await EventBroadcaster(wrong, port=0).start()
        assert "s3cret" not in str(caught.value)
