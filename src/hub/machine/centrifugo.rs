//! The session of a client that speaks Centrifugo's protocol: other words for what a
//! [`SubscriberMachine`](super::SubscriberMachine) does.
//!
//! A channel is one pattern with a position of its own. What a client missed of it follows the answer as pushes, read from
//! the log as the socket takes them, so that an answer is small however much that is.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use super::{Access, Checked};
use crate::error::{Error, ErrorKind, Result};
use crate::hub::auth::Denied;
use crate::hub::entry::Filter;
use crate::hub::log::NotRecovered;
use crate::hub::outbox::MAX_REPLAYS;
use crate::hub::registry::{Role, SessionId};
use crate::hub::state::{Published, State};
use crate::secret::Secret;
use crate::wire::centrifugo::{
    self, Command, Failure, History, MAX_COMMANDS, PING, Request, StreamPosition, Subscribe, Subscribed, Welcome,
};
use crate::wire::close::CloseCode;
use crate::wire::position::Position;
use crate::wire::subscriber::{self, Carried, MAX_PATTERNS};
use crate::wire::topic::Pattern;

/// Most publications of one `history`: more is for a subscription that recovers.
const MAX_HISTORY: usize = 300;

/// What a command needs that a machine cannot do; nothing more is read until it is done.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// A token is to be checked: [`CentrifugoMachine::on_checked`].
    Check(Secret),
    /// An event is to be published: [`CentrifugoMachine::on_published`].
    Publish(Bytes),
}

/// Whose reply is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    Connect(u32),
    Refresh(u32),
    Publish(u32),
}

/// See the module.
#[derive(Debug)]
pub struct CentrifugoMachine {
    id: SessionId,
    /// How often its client is pinged.
    ping_interval: Duration,
    connected: bool,
    /// What came and is not done yet.
    commands: VecDeque<Command>,
    open: Option<Open>,
}

impl CentrifugoMachine {
    /// The machine of a session that was just opened.
    #[must_use]
    pub fn new(id: SessionId, ping_interval: Duration) -> Self {
        Self { id, ping_interval, connected: false, commands: VecDeque::new(), open: None }
    }

    /// A text frame came. Its commands are done one after the other by [`CentrifugoMachine::next`].
    pub fn on_text(&mut self, text: &str, state: &mut State) {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let commands = lines.take(MAX_COMMANDS + 1).map(Command::decode).collect::<std::result::Result<Vec<_>, _>>();
        match commands {
            Ok(commands) if !commands.is_empty() && commands.len() <= MAX_COMMANDS => self.commands.extend(commands),
            _ => self.break_off(state),
        }
    }

    /// A binary frame came; the protocol's JSON is text.
    pub fn on_binary(&mut self, state: &mut State) {
        self.break_off(state);
    }

    /// Whether commands wait, for what was asked or for room in the queue.
    #[must_use]
    pub fn has_rest(&self) -> bool {
        self.open.is_some() || !self.commands.is_empty()
    }

    /// Does what it can of the commands that came, until there is something that only its driver can do, or until what is
    /// on its way leaves room for more: then it is to be called again when the socket has taken something.
    pub fn next(&mut self, access: &mut Access, state: &mut State, now: Duration) -> Option<Asked> {
        while self.open.is_none() {
            if state.registry.is_closing(self.id) {
                self.commands.clear();
            }
            let recovers =
                matches!(self.commands.front()?.request, Request::Subscribe(Subscribe { recover: true, .. }));
            if recovers && state.registry.replays(self.id) >= MAX_REPLAYS || state.registry.is_filling(self.id) {
                return None;
            }
            let asked = self.commands.pop_front().and_then(|command| self.on_command(command, access, state, now));
            if asked.is_some() {
                return asked;
            }
        }
        None
    }

    /// A token was checked: one that was asked for, or the one of the handshake.
    pub fn on_checked(&mut self, checked: Checked, access: &mut Access, state: &mut State, now: Duration) {
        let open = self.open.take();
        if let (Some(Open::Connect(id) | Open::Refresh(id)), Err(denied)) = (open, &checked) {
            let failure = match denied {
                Denied::Expired => Failure::TokenExpired,
                Denied::Invalid(_) => Failure::Unauthorized,
                Denied::Unavailable(_) => Failure::Internal,
            };
            self.fail(id, failure, &denied.to_string(), state);
        }
        let good = checked.is_ok();
        let lost = access.on_checked(checked, Role::Centrifugo, state);
        match open {
            Some(Open::Connect(id)) if good => self.welcome(id, "connect", access, state, now),
            Some(Open::Refresh(id)) if good => self.welcome(id, "refresh", access, state, now),
            _ => {}
        }
        for channel in lost {
            state.registry.push(self.id, centrifugo::taken_away(channel.as_str()));
        }
    }

    /// What became of the event that was to be published.
    pub fn on_published(&mut self, published: Result<Published>, state: &mut State) {
        let Some(Open::Publish(id)) = self.open.take() else { return };
        match published {
            Ok(_) => state.registry.push(self.id, centrifugo::done(id, "publish")),
            Err(error) => self.fail(id, failure(&error), &error.report(), state),
        }
    }

    /// Asks for a sign of life; false if the client does not know yet what that is.
    pub fn ping(&self, state: &mut State) -> bool {
        if self.connected {
            state.registry.push(self.id, Bytes::from_static(PING));
        }
        self.connected
    }

    fn on_command(
        &mut self,
        Command { id, request }: Command,
        access: &mut Access,
        state: &mut State,
        now: Duration,
    ) -> Option<Asked> {
        if self.connected == matches!(request, Request::Connect { .. }) {
            self.break_off(state); // it connects twice, or does something else first
            return None;
        }
        match request {
            Request::Connect { token: Some(token) } => {
                self.open = Some(Open::Connect(id));
                return Some(Asked::Check(token));
            }
            Request::Connect { token: None } if access.grant().is_some() => {
                self.welcome(id, "connect", access, state, now);
            }
            Request::Connect { token: None } => {
                self.open = Some(Open::Connect(id));
                let denied = Denied::Invalid("show a token with connect".into());
                self.on_checked(Err(denied), access, state, now);
            }
            Request::Refresh { token } => {
                self.open = Some(Open::Refresh(id));
                return Some(Asked::Check(token));
            }
            Request::Subscribe(wanted) => self.subscribe(id, wanted, access, state, now),
            Request::Unsubscribe { channel } => self.unsubscribe(id, &channel, state),
            Request::Publish { channel, data } => match centrifugo::event(&channel, &data) {
                Ok(event) => {
                    self.open = Some(Open::Publish(id));
                    return Some(Asked::Publish(event));
                }
                Err(why) => self.fail(id, Failure::BadRequest, &why, state),
            },
            Request::History(wanted) => self.history(id, &wanted, access, state, now),
            Request::Ping => state.registry.push(self.id, centrifugo::done(id, "ping")),
            Request::Pong => {}
            Request::NotOffered => self.fail(id, Failure::NotAvailable, "this hub does not offer that", state),
        }
        None
    }

    fn welcome(&mut self, id: u32, name: &str, access: &Access, state: &mut State, now: Duration) {
        self.connected = true;
        let connects = name == "connect";
        let left = access.deadline().map(|until| until.saturating_sub(now));
        // Names of sessions begin again when a hub does.
        let client = format!("{}-{}", state.log.epoch(), self.id);
        let welcome = Welcome {
            client: &client,
            version: concat!("safe-broadcaster ", env!("CARGO_PKG_VERSION")),
            expires: left.is_some(),
            ttl: left.map(refresh_after),
            ping: connects.then(|| self.ping_interval.as_secs_f64().ceil() as u64),
            pong: connects,
        };
        state.registry.push(self.id, centrifugo::reply(id, name, &welcome));
    }

    fn subscribe(&mut self, id: u32, wanted: Subscribe, access: &Access, state: &mut State, now: Duration) {
        let channel = match Pattern::parse(&wanted.channel) {
            Ok(channel) => channel,
            Err(why) => return self.fail(id, Failure::BadRequest, &why.to_string(), state),
        };
        let own = state.registry.own_filter(self.id);
        let refused = if wanted.is_special() {
            Some((Failure::NotAvailable, "tags and other kinds of channels are not offered here".to_owned()))
        } else if access.grant().is_none_or(|grant| !grant.may_subscribe(&channel)) {
            Some((Failure::PermissionDenied, format!("the token does not grant all of {}", channel.as_str())))
        } else if own.patterns().contains(&channel) {
            Some((Failure::AlreadySubscribed, "already subscribed".to_owned()))
        } else if own.patterns().len() >= MAX_PATTERNS {
            Some((Failure::LimitExceeded, format!("a session has at most {MAX_PATTERNS} channels")))
        } else {
            None
        };
        if let Some((failure, message)) = refused {
            return self.fail(id, failure, &message, state);
        }
        let rejects = wanted.rejects_unrecovered();
        let since = wanted.recover.then_some(Position { epoch: wanted.epoch, offset: wanted.offset });
        if rejects && let Some(since) = &since {
            // A doubt closes the session, as it does without this.
            if let Some(why) = state.can_recover(self.id, since, now).err().and_then(NotRecovered::word) {
                state.counters.not_recovered += 1;
                return self.fail(id, Failure::Unrecoverable, why, state);
            }
        }
        let wanted = subscriber::Subscribe { events: vec![channel], since, ..subscriber::Subscribe::default() };
        state.subscribe_with(self.id, &wanted, now, |answer| {
            let recovered = answer.recovered == Some(true);
            // Until it has what it missed, it stands where it stood.
            let stood = wanted.since.as_ref().filter(|_| recovered).map(|since| since.offset);
            let subscribed = Subscribed {
                recoverable: true,
                positioned: true,
                epoch: answer.epoch,
                offset: stood.unwrap_or(answer.offset),
                was_recovering: wanted.since.is_some(),
                recovered,
            };
            centrifugo::reply(id, "subscribe", &subscribed)
        });
    }

    fn unsubscribe(&self, id: u32, channel: &str, state: &mut State) {
        let channel = Pattern::parse(channel).ok();
        state.registry.forget_replays(self.id, &Filter::new(channel.clone()));
        state.unsubscribe(self.id, channel.as_slice(), centrifugo::done(id, "unsubscribe"));
    }

    fn history(&self, id: u32, wanted: &History, access: &Access, state: &mut State, now: Duration) {
        let channel = match Pattern::parse(&wanted.channel) {
            Ok(channel) => channel,
            Err(why) => return self.fail(id, Failure::BadRequest, &why.to_string(), state),
        };
        if access.grant().is_none_or(|grant| !grant.may_subscribe(&channel)) {
            let message = format!("the token does not grant all of {}", channel.as_str());
            return self.fail(id, Failure::PermissionDenied, &message, state);
        }
        state.log.evict(now);
        let head = state.log.head();
        let (mut from, mut to) = (state.log.first(), head + 1);
        if let Some(StreamPosition { offset, epoch }) = &wanted.since {
            let position = Position { epoch: epoch.clone(), offset: *offset };
            if let Err(why) = state.log.since(&position, now).map(drop) {
                let (failure, message) = match why.word() {
                    Some(word) => (Failure::Unrecoverable, word),
                    None => (Failure::Internal, "this hub does not know that position yet: ask again"),
                };
                return self.fail(id, failure, message, state);
            }
            if wanted.reverse { to = *offset } else { from = offset + 1 }
        }
        let filter = Filter::new([channel]);
        let limit = usize::try_from(wanted.limit).unwrap_or(MAX_HISTORY).min(MAX_HISTORY);
        let most = state.registry.queue_bytes() / 4;
        let mut entries = state.log.range(from, to);
        let mut next = || if wanted.reverse { entries.next_back() } else { entries.next() };
        let (mut publications, mut bytes) = (Vec::new(), 0);
        while publications.len() < limit
            && bytes < most
            && let Some(entry) = next()
        {
            if entry.record.carried() == Carried::Event && filter.matches(&entry.record) {
                let mut publication = Vec::new();
                centrifugo::publication(&mut publication, entry.offset, entry.record.json());
                bytes += publication.len();
                publications.push(publication);
            }
        }
        let reply = centrifugo::history(id, &publications, state.log.epoch(), head);
        state.registry.push(self.id, reply);
    }

    fn fail(&self, id: u32, failure: Failure, message: &str, state: &mut State) {
        state.registry.push(self.id, failure.reply(id, message));
    }

    /// What came is not this protocol.
    fn break_off(&mut self, state: &mut State) {
        self.commands.clear();
        state.counters.bad_frames += 1;
        state.registry.order_close(self.id, CloseCode::BadFrame);
    }
}

/// Seconds after which a token is to be replaced: some time before its end, which is the session's too.
fn refresh_after(left: Duration) -> u64 {
    const AHEAD: Duration = Duration::from_secs(10);
    left.saturating_sub((left / 4).min(AHEAD)).as_secs().max(1)
}

fn failure(error: &Error) -> Failure {
    match error.kind() {
        ErrorKind::NotAllowed => Failure::PermissionDenied,
        _ if error.is_poison() => Failure::BadRequest,
        _ => Failure::Internal,
    }
}

#[cfg(test)]
mod tests;
