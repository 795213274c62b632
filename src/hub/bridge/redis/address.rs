//! Where a Redis is, from a URL; shown without the password. Where sentinels or a cluster know who takes writes, they are
//! asked anew for each link, because a link is made anew when that has changed.

use std::fmt;
use std::path::Path;

use redis::io::tcp::TcpSettings;
use redis::{Client, Cmd, ConnectionInfo, FromRedisValue, IntoConnectionInfo as _, RedisError, TlsCertificates, cmd};

use crate::error::{Error, ErrorKind, Result};
use crate::secret::Secret;

const ALLOWED: &str = "give redis://[user:password@]host[:port][/db], rediss://… for TLS, redis+unix:///path, \
                       redis+sentinel://[user:password@]host[:port],…/service[/db][?sentinel_password=…], or \
                       redis+cluster://[user:password@]host[:port],…";

/// See the module.
pub(super) struct Address {
    form: Form,
    ca: Option<Vec<u8>>,
    /// The URL without its password.
    shown: String,
}

enum Form {
    Single(ConnectionInfo),
    /// Sentinels know the address of a service.
    Sentinel {
        nodes: Vec<String>,
        service: String,
        /// How to speak to them.
        asked: Target,
        target: Target,
    },
    /// Any node knows which one has a key.
    Cluster {
        nodes: Vec<String>,
        target: Target,
    },
}

/// How to speak to a server whose address others tell.
struct Target {
    scheme: &'static str,
    /// `user:password@`, or empty.
    login: Secret,
    db: i64,
}

impl Target {
    fn url(&self, place: &str) -> String {
        format!("{}://{}{place}/{}", self.scheme, self.login.expose(), self.db)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl Address {
    pub(super) fn parse(url: &str, ca: Option<&Path>) -> Result<Self> {
        let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
        let (form, shown) = match scheme {
            "redis+sentinel" | "rediss+sentinel" | "redis+cluster" | "rediss+cluster" => several(scheme, url)?,
            _ => single(url)?,
        };
        let ca = ca.map(|path| {
            std::fs::read(path).map_err(|error| {
                let message = format!("redis_ca={} is not allowed: give a PEM file that can be read", path.display());
                Error::new(ErrorKind::Config, message).with_source(error)
            })
        });
        Ok(Self { form, ca: ca.transpose()?, shown })
    }

    /// The number of the database.
    pub(super) fn database(&self) -> i64 {
        match &self.form {
            Form::Single(info) => info.redis_settings().db(),
            Form::Sentinel { target, .. } | Form::Cluster { target, .. } => target.db,
        }
    }

    /// A client for the server that takes writes to this key at the moment.
    pub(super) async fn client(&self, key: &str) -> Result<Client> {
        let made = match &self.form {
            Form::Single(info) => self.open(info.clone()),
            Form::Sentinel { nodes, service, asked, target } => {
                let mut ask = cmd("SENTINEL");
                ask.arg("GET-MASTER-ADDR-BY-NAME").arg(service);
                let ((host, port), _): ((String, u16), _) = self.first_answer(nodes, asked, &ask).await?;
                self.open_url(&target.url(&place(&host, port)))
            }
            Form::Cluster { nodes, target } => {
                let (slot, _): (u16, _) =
                    self.first_answer(nodes, target, cmd("CLUSTER").arg("KEYSLOT").arg(key)).await?;
                let (slots, node) = self.first_answer(nodes, target, cmd("CLUSTER").arg("SLOTS")).await?;
                let owner = first_of_each(slots).into_iter().find(|(from, to, _)| (*from..=*to).contains(&slot));
                let (_, _, (host, port)) = owner.ok_or_else(|| self.away("no node has the slot of the stream"))?;
                // A node that does not know its own name is where it was found.
                let found = node.rsplit_once(':').map_or(node, |(host, _)| host);
                let place = if host.is_empty() { format!("{found}:{port}") } else { place(&host, port) };
                self.open_url(&target.url(&place))
            }
        };
        made.map_err(|error| self.away(&error.to_string()))
    }

    /// What the first node says that answers, and which one that is.
    async fn first_answer<'a, T: FromRedisValue>(
        &self,
        nodes: &'a [String],
        target: &Target,
        ask: &Cmd,
    ) -> Result<(T, &'a str)> {
        let mut why = String::from("there is no node");
        for node in nodes {
            let asked = async {
                let client = self.open_url(&target.url(node))?;
                ask.query_async(&mut client.get_multiplexed_async_connection().await?).await
            };
            match asked.await {
                Ok(answer) => return Ok((answer, node)),
                Err::<_, RedisError>(error) => why = format!("{node}: {error}"),
            }
        }
        Err(self.away(&why))
    }

    fn open_url(&self, url: &str) -> Result<Client, RedisError> {
        self.open(url.into_connection_info()?)
    }

    fn open(&self, info: ConnectionInfo) -> Result<Client, RedisError> {
        // A live message is small and must not wait for more.
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        match &self.ca {
            None => Client::open(info),
            Some(ca) => Client::build_with_tls(info, TlsCertificates { client_tls: None, root_cert: Some(ca.clone()) }),
        }
    }

    fn away(&self, why: &str) -> Error {
        Error::new(ErrorKind::BusDown, format!("cannot use the Redis at {self}: {why}"))
    }
}

fn refused(why: &str) -> Error {
    Error::new(ErrorKind::Config, format!("redis_client is no URL of a Redis ({why}): {ALLOWED}"))
}

fn single(url: &str) -> Result<(Form, String)> {
    let mut shown = url::Url::parse(url).map_err(|error| refused(&error.to_string()))?;
    let info = url.into_connection_info().map_err(|error| refused(&error.to_string()))?;
    if shown.fragment() == Some("insecure") {
        return Err(refused("#insecure is not possible: certificates are checked, those of your own against redis_ca"));
    }
    if shown.password().is_some() {
        // An error means that this kind of URL has no password.
        shown.set_password(Some("***")).unwrap_or_default();
    }
    shown.set_query(None);
    Ok((Form::Single(info), shown.into()))
}

fn several(scheme: &str, url: &str) -> Result<(Form, String)> {
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (login, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let sentinel = scheme.ends_with("sentinel");
    let port = if sentinel { 26379 } else { 6379 };
    let has_port = |host: &str| host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let full = |host: &str| if has_port(host) { host.to_owned() } else { format!("{host}:{port}") };
    let nodes: Vec<String> = hosts.split(',').filter(|host| !host.is_empty()).map(full).collect();
    let (service, db) = if sentinel { path.split_once('/').unwrap_or((path, "")) } else { ("", path) };
    let db = if db.is_empty() { 0 } else { db.parse().map_err(|_| refused("the database is a number"))? };
    let secure = if scheme.starts_with("rediss") { "rediss" } else { "redis" };
    let of = |login: &str| Secret::new(if login.is_empty() { String::new() } else { format!("{login}@") });
    let target = Target { scheme: secure, login: of(login), db };
    let asked = Target { scheme: secure, login: of(&sentinels_login(query, sentinel)?), db: 0 };
    if nodes.is_empty() || (sentinel && service.is_empty()) {
        return Err(refused("it names no node, or no service"));
    }
    for node in &nodes {
        // Not the error, which could show the password.
        for of in [&target, &asked] {
            of.url(node).into_connection_info().map_err(|_| refused("a node or a login is malformed"))?;
        }
    }
    let user = login.split_once(':').map_or(login, |(user, _)| user);
    let hidden = if login.is_empty() { String::new() } else { format!("{user}:***@") };
    let shown = format!("{scheme}://{hidden}{hosts}/{path}");
    let service = service.to_owned();
    Ok((
        if sentinel { Form::Sentinel { nodes, service, asked, target } } else { Form::Cluster { nodes, target } },
        shown,
    ))
}

/// How sentinels want to be greeted: `sentinel_username` and `sentinel_password` of the query.
fn sentinels_login(query: &str, sentinel: bool) -> Result<String> {
    let (mut user, mut password) = ("", "");
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("sentinel_username", given)) if sentinel => user = given,
            Some(("sentinel_password", given)) if sentinel => password = given,
            _ => return Err(refused("its query has something else than sentinel_username and sentinel_password")),
        }
    }
    Ok(if user.is_empty() && password.is_empty() { String::new() } else { format!("{user}:{password}") })
}

fn place(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// The ranges of slots with the first node of each, which takes its writes.
fn first_of_each(ranges: Vec<Vec<redis::Value>>) -> Vec<(u16, u16, (String, u16))> {
    let of = |range: Vec<redis::Value>| {
        let mut parts = range.into_iter();
        let from = redis::from_redis_value(parts.next()?).ok()?;
        let to = redis::from_redis_value(parts.next()?).ok()?;
        let node: Vec<redis::Value> = redis::from_redis_value(parts.next()?).ok()?;
        let mut node = node.into_iter();
        let host = redis::from_redis_value(node.next()?).ok()?;
        Some((from, to, (host, redis::from_redis_value(node.next()?).ok()?)))
    };
    ranges.into_iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(url: &str) -> String {
        Address::parse(url, None).map_or_else(|error| error.to_string(), |address| address.to_string())
    }

    #[test]
    fn every_form_is_read_and_shown_without_its_password() {
        for (url, want) in [
            ("redis://h", "redis://h"),
            ("redis://u:s3cret@h:7000/2", "redis://u:***@h:7000/2"),
            ("rediss://:s3cret@h/1", "rediss://:***@h/1"),
            ("redis+unix:///run/r.sock?pass=s3cret", "redis+unix:///run/r.sock"),
            ("redis+sentinel://:s3cret@a,b:7000/main/3", "redis+sentinel://:***@a,b:7000/main/3"),
            ("redis+sentinel://a/main?sentinel_password=s3cret", "redis+sentinel://a/main"),
            ("redis+cluster://u:s3@cret@a:1,b", "redis+cluster://u:***@a:1,b/"),
        ] {
            assert_eq!(shown(url), want);
        }
        let address = Address::parse("redis+sentinel://:s3cret@a,[::1]:7000/main/3", None).expect("valid");
        assert_eq!(address.database(), 3);
        let Form::Sentinel { nodes, service, asked, target } = &address.form else { panic!("a sentinel") };
        assert_eq!((&*asked.url("a:1"), &*target.url("a:1")), ("redis://a:1/0", "redis://:s3cret@a:1/3"));
        assert_eq!((&nodes[..], &**service), (&["a:26379".to_owned(), "[::1]:7000".to_owned()][..], "main"));
    }

    #[test]
    fn what_is_no_address_is_refused_without_its_password() {
        for url in [
            "",
            "s3cret",
            "http://:s3cret@h",
            "redis+sentinel://:s3cret@a",
            "redis+cluster://:s3cret@/",
            "redis+sentinel://a/m/x",
            "redis+sentinel://a/m?password=s3cret",
            "redis+cluster://a?sentinel_password=s3cret",
            "rediss://:s3cret@h/0#insecure",
        ] {
            let error = shown(url);
            assert!(error.contains("redis_client is no URL of a Redis") && !error.contains("s3cret"), "{url}: {error}");
        }
    }
}
