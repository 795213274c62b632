//! What a client may do.

use std::fmt;
use std::sync::Arc;

use crate::hub::entry::{Filter, Record};
use crate::wire::topic::Pattern;

/// The patterns that someone may use. Cloning shares them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope(Arc<[Pattern]>);

impl Scope {
    /// These patterns; none allows nothing.
    #[must_use]
    pub fn new(patterns: impl IntoIterator<Item = Pattern>) -> Self {
        Self(patterns.into_iter().collect())
    }

    /// The patterns as a filter.
    #[must_use]
    pub fn filter(&self) -> Filter {
        Filter::new(self.0.iter().cloned())
    }

    /// Whether all that a pattern can match is allowed by one pattern of the scope.
    #[must_use]
    pub fn contains(&self, pattern: &Pattern) -> bool {
        self.0.iter().any(|allowed| allowed.contains(pattern))
    }

    /// Whether an event may be published: every address under which subscribers could find it must be allowed, its
    /// type, its topic and those of the entities that it names. One alone would let a stranger in through the other.
    #[must_use]
    pub fn allows(&self, event: &Record) -> bool {
        let (kind, topic) = (event.kind(), event.topic());
        let any = |kind: &str, topic: &str| self.0.iter().any(|allowed| allowed.matches(kind, topic));
        any(kind, topic)
            && (kind.is_empty() || any(kind, ""))
            && (topic.is_empty() || any("", topic))
            && event.entities().iter().all(|topic| any("", topic))
    }
}

/// The words for an event outside of its publisher's grant.
#[must_use]
pub fn not_granted(event: &Record) -> String {
    let name = |text: &str| text.chars().take(200).collect::<String>();
    let (kind, topic) = (name(event.kind()), name(event.topic()));
    format!("the token does not grant publishing events of type '{kind}' and topic '{topic}'")
}

/// What a token allows, and for how long.
#[derive(Clone, PartialEq)]
pub struct Grant {
    /// Who it is, for answers and people; `None` for a token without a name.
    pub subject: Option<String>,
    /// What may be subscribed to; `None` is everything.
    pub subscribe: Option<Scope>,
    /// What may be published; `None` is everything.
    pub publish: Option<Scope>,
    /// Unix seconds from which on it counts no more; `None` for ever.
    pub expires: Option<f64>,
}

impl Grant {
    /// What those have who need no token, or know the static one.
    #[must_use]
    pub fn everything() -> Self {
        Self { subject: None, subscribe: None, publish: None, expires: None }
    }

    /// Whether a pattern may be subscribed to.
    #[must_use]
    pub fn may_subscribe(&self, pattern: &Pattern) -> bool {
        self.subscribe.as_ref().is_none_or(|scope| scope.contains(pattern))
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant").field("subject", &self.subject).field("expires", &self.expires).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn scope(patterns: &[&str]) -> Scope {
        Scope::new(patterns.iter().map(|text| Pattern::parse(text).expect("valid")))
    }

    fn event(kind: &str, topic: &str) -> Record {
        Record::event(json!({"type": kind, "topic": topic}).to_string().into()).expect("valid")
    }

    #[test]
    fn a_subscription_must_lie_within_one_pattern_of_the_grant() {
        let scope = scope(&["alert.*", "graph/ada/*"]);
        let contains = |text| scope.contains(&Pattern::parse(text).expect("valid"));
        assert!(contains("alert.disk") && contains("alert.*") && contains("graph/ada/x/y"));
        assert!(!contains("*") && !contains("alert") && !contains("*.disk") && !contains("graph/*"));
        assert!(!Scope::new([]).contains(&Pattern::parse("a").expect("valid")));
    }

    #[test]
    fn an_event_is_published_under_addresses_that_are_all_granted() {
        let types = scope(&["alert.*"]);
        assert!(types.allows(&event("alert.disk", "")));
        assert!(!types.allows(&event("other", "")) && !types.allows(&event("", "")));
        // It would reach those who listen to the topic.
        assert!(!types.allows(&event("alert.disk", "graph/ada")));
        let both = scope(&["alert.*", "graph/ada/*"]);
        assert!(both.allows(&event("alert.disk", "graph/ada/x")) && both.allows(&event("", "graph/ada/x")));
        assert!(!both.allows(&event("other", "graph/ada/x")) && !both.allows(&event("alert.disk", "graph/bob/x")));
        let all = scope(&["*"]);
        assert!(all.allows(&event("", "")) && all.allows(&event("a", "b/c")));
    }
}
