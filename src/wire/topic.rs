//! Patterns over event types (`graph.delta.heartbeat`) and topics (`graph/ada/delta/heartbeat`).
//!
//! `*` matches one segment, and as the last segment one or more; `*` alone matches everything. A pattern with `/` is
//! held against the topic, any other against the type.

/// A subscription pattern, split once.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern {
    text: String,
}

/// Why a text is no pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatternError {
    /// Nothing in it.
    Empty,
    /// Longer than [`Pattern::MAX_BYTES`].
    TooLong,
    /// More segments than [`Pattern::MAX_SEGMENTS`].
    TooDeep,
    /// Holds a control character.
    Control,
}

impl std::fmt::Display for PatternError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Empty => f.write_str("pattern is empty"),
            Self::TooLong => write!(f, "pattern is longer than {} bytes", Pattern::MAX_BYTES),
            Self::TooDeep => write!(f, "pattern has more than {} segments", Pattern::MAX_SEGMENTS),
            Self::Control => f.write_str("pattern holds a control character"),
        }
    }
}

impl std::error::Error for PatternError {}

impl Pattern {
    /// Longest pattern taken, in bytes: far beyond real topics, small enough to be harmless.
    pub const MAX_BYTES: usize = 1024;
    /// Most segments of a pattern; each may cost a node of the index. Names may have more: a last `*` matches the rest.
    pub const MAX_SEGMENTS: usize = 32;

    /// Reads a pattern.
    ///
    /// # Errors
    /// [`PatternError`] for an empty, overlong, too deep or unprintable one.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() {
            return Err(PatternError::Empty);
        }
        if text.len() > Self::MAX_BYTES {
            return Err(PatternError::TooLong);
        }
        if text.chars().any(char::is_control) {
            return Err(PatternError::Control);
        }
        let pattern = Self { text: text.to_owned() };
        if pattern.segments().nth(Self::MAX_SEGMENTS).is_some() {
            return Err(PatternError::TooDeep);
        }
        Ok(pattern)
    }

    /// The pattern as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What it is held against.
    #[must_use]
    pub fn subject(&self) -> Subject {
        if self.text == "*" {
            Subject::All
        } else if self.text.contains('/') {
            Subject::Topic
        } else {
            Subject::Kind
        }
    }

    /// Its segments.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.text.split(self.subject().separator())
    }

    /// Whether an event with this type and topic (empty where it has none) matches.
    #[must_use]
    pub fn matches(&self, kind: &str, topic: &str) -> bool {
        match self.subject() {
            Subject::All => true,
            Subject::Topic => segments_match(&self.text, topic, '/'),
            Subject::Kind => segments_match(&self.text, kind, '.'),
        }
    }

    /// Whether it matches every event that `other` matches.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        match (self.subject(), other.subject()) {
            (Subject::All, _) => return true,
            (mine, others) if mine != others => return false,
            _ => {}
        }
        let (mut mine, mut others) = (self.segments().peekable(), other.segments().peekable());
        while let Some(segment) = mine.next() {
            let Some(part) = others.next() else { return false };
            if segment == "*" {
                if mine.peek().is_none() {
                    return true;
                }
                // A last star is also for names that end here, and this pattern wants more.
                if part == "*" && others.peek().is_none() {
                    return false;
                }
            } else if segment != part {
                return false;
            }
        }
        others.next().is_none()
    }
}

/// What a pattern is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Nothing: it matches every event.
    All,
    /// The type.
    Kind,
    /// The topic.
    Topic,
}

impl Subject {
    /// Between two segments.
    #[must_use]
    pub fn separator(self) -> char {
        if self == Self::Topic { '/' } else { '.' }
    }
}

fn segments_match(pattern: &str, name: &str, separator: char) -> bool {
    if name.is_empty() {
        return false;
    }
    let mut want = pattern.split(separator).peekable();
    let mut have = name.split(separator);
    while let Some(segment) = want.next() {
        let Some(part) = have.next() else { return false };
        if segment == "*" {
            if want.peek().is_none() {
                return true;
            }
        } else if segment != part {
            return false;
        }
    }
    have.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matches(pattern: &str, kind: &str, topic: &str) -> bool {
        Pattern::parse(pattern).expect("valid").matches(kind, topic)
    }

    #[test]
    fn a_star_is_one_segment_and_at_the_end_one_or_more() {
        assert!(matches("alert.*", "alert.disk", ""));
        assert!(matches("alert.*", "alert.disk.full", ""));
        assert!(!matches("alert.*", "alert", ""));
        assert!(!matches("alert.*", "alerts.disk", ""));
        assert!(matches("graph.*.node.upsert", "graph.delta.node.upsert", ""));
        assert!(!matches("graph.*.upsert", "graph.delta.node.upsert", ""));
        assert!(matches("*", "", ""));
    }

    #[test]
    fn a_slash_makes_it_a_topic_pattern() {
        assert!(matches("graph/*/delta/*", "x", "graph/ada/delta/node"));
        assert!(!matches("graph/*/delta/*", "graph.ada.delta.node", ""));
        assert!(!matches("graph.*", "", "graph.x"));
    }

    /// Events that decide whether a pattern with few segments contains `pattern`: each star stands for a text that no
    /// pattern has, and a last one also for two of them.
    fn witnesses(pattern: &Pattern) -> Vec<(String, String)> {
        let filled =
            pattern.text.split(pattern.subject().separator()).map(|part| if part == "*" { "new" } else { part });
        let separator = pattern.subject().separator().to_string();
        let one = filled.collect::<Vec<_>>().join(&separator);
        let mut names = vec![one.clone()];
        if pattern.text.ends_with(&format!("{separator}*")) {
            names.push(format!("{one}{separator}new"));
        }
        let event = |name| match pattern.subject() {
            Subject::All => (String::new(), String::new()),
            Subject::Kind => (name, String::new()),
            Subject::Topic => (String::new(), name),
        };
        names.into_iter().map(event).collect()
    }

    fn any_pattern() -> impl Strategy<Value = Pattern> {
        let segments = prop::collection::vec(prop_oneof![Just("*"), Just("a"), Just("b"), Just("")], 1..5);
        (segments, prop_oneof![Just("."), Just("/")])
            .prop_filter_map("an empty text is no pattern", |(parts, separator)| {
                Pattern::parse(&parts.join(separator)).ok()
            })
    }

    proptest! {
        #[test]
        fn a_pattern_contains_another_if_it_matches_all_that_the_other_does(a in any_pattern(), b in any_pattern()) {
            let all = witnesses(&b).iter().all(|(kind, topic)| {
                assert!(b.matches(kind, topic), "{b:?} and {kind:?}, {topic:?}");
                a.matches(kind, topic)
            });
            prop_assert_eq!(a.contains(&b), all, "{:?} contains {:?}", a, b);
            prop_assert!(a.contains(&a));
        }
    }

    #[test]
    fn impossible_patterns_are_refused() {
        assert_eq!(Pattern::parse(""), Err(PatternError::Empty));
        assert_eq!(Pattern::parse(&"a".repeat(2000)), Err(PatternError::TooLong));
        assert_eq!(Pattern::parse("a\nb"), Err(PatternError::Control));
        let deep = |segments: usize| vec!["a"; segments].join(".");
        assert_eq!(Pattern::parse(&deep(33)), Err(PatternError::TooDeep));
        assert!(matches(&deep(32), &deep(32), "") && matches("a.*", &deep(100), ""));
    }
}
