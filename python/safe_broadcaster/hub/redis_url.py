"""What a program gives as ``redis_client``, as a URL: the core makes connections of its own.

The object of redis-py is only asked where its server is; nothing is sent over it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["redis_settings"]

_ALLOWED = "a redis:// URL, a redis.asyncio.Redis, or None"
_WRAPPED = ("client", "redis", "_client", "_redis")
"""Where programs keep the client in a class of their own."""
_TLS = ("ssl_certfile", "ssl_keyfile", "ssl_ca_path", "ssl_ca_data", "ssl_password")
"""What of TLS the core's connections cannot do."""


def redis_settings(redis_client: object) -> dict[str, Any]:
    """Return the settings ``redis_url`` and ``redis_ca`` for what was given; nothing for None.

    Raises `ConfigError` if it is neither a URL nor a client that tells where its server is. Passwords are not shown.
    """
    if redis_client is None:
        return {}
    if isinstance(redis_client, str):
        return {"redis_url": redis_client}
    pool = _pool(redis_client)
    if pool is None and hasattr(redis_client, "nodes_manager"):
        raise _refused(redis_client, "of a cluster its nodes are not told: give redis+cluster://host:port,host:port")
    if pool is None:
        raise _refused(redis_client, "it has no connection_pool")
    settings = _from_kwargs(redis_client, pool.connection_kwargs, pool.connection_class.__name__)
    return _by_sentinels(redis_client, pool, settings) if hasattr(pool, "sentinel_manager") else settings


def _pool(client: object) -> Any:
    for holder in (client, *(getattr(client, name, None) for name in _WRAPPED)):
        pool = getattr(holder, "connection_pool", None)
        if hasattr(pool, "connection_kwargs") and hasattr(pool, "connection_class"):
            return pool
    return None


def _from_kwargs(client: object, kwargs: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kwargs.get("credential_provider") is not None:
        raise _refused(client, "its password comes from a credential_provider: give a URL with the password")
    user = _quoted(kwargs.get("username"))
    password = _quoted(kwargs.get("password"))
    login = f"{user}:{password}@" if password else f"{user}@" if user else ""
    db = int(kwargs.get("db") or 0)
    if kwargs.get("path") is not None:
        query = "&".join(
            f"{name}={value}" for name, value in (("db", db or ""), ("user", user), ("pass", password)) if value != ""
        )
        return {"redis_url": f"redis+unix://{quote(str(kwargs['path']))}" + (f"?{query}" if query else "")}
    tls = "SSL" in kind
    if tls:
        unknown = [name for name in _TLS if kwargs.get(name) is not None]
        if unknown:
            raise _refused(client, f"{unknown[0]} is not known here: give a rediss:// URL, and redis_ca if needed")
    place = _bracketed(kwargs.get("host", "localhost"))
    if tls and kwargs.get("ssl_cert_reqs") in {"none", 0}:
        raise _refused(client, "ssl_cert_reqs='none' is not possible here: give redis_ca for certificates of your own")
    url = f"{'rediss' if tls else 'redis'}://{login}{place}:{int(kwargs.get('port', 6379))}/{db}"
    ca = cast("str | None", kwargs.get("ssl_ca_certs")) if tls else None
    return {"redis_url": url} if ca is None else {"redis_url": url, "redis_ca": ca}


def _by_sentinels(client: object, pool: Any, settings: dict[str, Any]) -> dict[str, Any]:
    if not pool.is_master:
        raise _refused(client, "it reads from replicas: give the one of master_for()")
    sentinels = [each.connection_pool.connection_kwargs for each in pool.sentinel_manager.sentinels]
    hosts = ",".join(
        f"{_bracketed(each.get('host', 'localhost'))}:{int(each.get('port', 26379))}" for each in sentinels
    )
    login = [(name, _quoted(sentinels[0].get(name))) for name in ("username", "password")]
    query = "&".join(f"sentinel_{name}={value}" for name, value in login if value)
    scheme, rest = settings["redis_url"].split("://")
    at, _, place = rest.rpartition("@")
    service, db = _quoted(pool.service_name), place.rpartition("/")[2]
    url = f"{scheme}+sentinel://{at}{'@' if at else ''}{hosts}/{service}/{db}" + (f"?{query}" if query else "")
    return {**settings, "redis_url": url}


def _bracketed(host: object) -> str:
    return f"[{host}]" if ":" in str(host) else str(host)


def _quoted(part: object) -> str:
    if isinstance(part, bytes):
        part = part.decode()
    return "" if part is None else quote(str(part), safe="")


def _refused(client: object, why: str) -> ConfigError:
    # Not its repr, which may have a password in it.
    return ConfigError(f"redis_client=<{type(client).__name__}> is not allowed ({why}): give {_ALLOWED}")
