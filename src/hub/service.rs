//! What subscribers are told of the hub's own health: when something that they rely on fails, and when it is over.

use bytes::Bytes;

use crate::wire::subscriber;

/// What can fail while sessions live on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The durable log refuses events.
    Log = 0,
    /// What a supervisor outside the core watches, the port above all.
    Supervised = 1,
    /// The bus to the other hubs is away.
    Bridge = 2,
}

/// How many there are.
const PARTS: usize = 3;

/// See the module.
#[derive(Debug, Default)]
pub struct Service {
    /// What is the matter with each part.
    troubles: [Option<String>; PARTS],
    /// States of their breakers; empty where there is none.
    circuits: [String; PARTS],
    /// Offset of the log when the first trouble began.
    since: u64,
    /// What subscribers were told last.
    told: Option<Bytes>,
}

impl Service {
    /// A part fails, or with `None` works again. Returns what subscribers are to be told, if that is news.
    pub fn set(&mut self, part: Part, trouble: Option<String>, head: u64) -> Option<Bytes> {
        if trouble.is_some() && !self.is_degraded() {
            self.since = head;
        }
        self.troubles[part as usize] = trouble;
        self.news(head)
    }

    /// The breaker of a part is in this state.
    pub fn set_circuit(&mut self, part: Part, circuit: &str) {
        circuit.clone_into(&mut self.circuits[part as usize]);
    }

    /// The worst state of any breaker.
    #[must_use]
    pub fn circuit(&self) -> &'static str {
        let any = |state: &&str| self.circuits.iter().any(|circuit| circuit == state);
        ["open", "half_open"].into_iter().find(any).unwrap_or("closed")
    }

    /// Whether anything fails.
    #[must_use]
    pub fn is_degraded(&self) -> bool {
        self.troubles.iter().any(Option::is_some)
    }

    /// What a subscriber is told that comes now; nothing if all is well.
    #[must_use]
    pub fn notice(&self) -> Option<Bytes> {
        self.is_degraded().then(|| self.told.clone()).flatten()
    }

    fn news(&mut self, head: u64) -> Option<Bytes> {
        if !self.is_degraded() && self.told.is_none() {
            return None;
        }
        let circuit = self.circuit();
        let troubles: Vec<&str> = self.troubles.iter().flatten().map(String::as_str).collect();
        let frame = if troubles.is_empty() {
            self.told = None;
            subscriber::service_status("healthy", "Events are broadcast as usual again.", circuit, head)
        } else {
            let frame = subscriber::service_status("degraded", &troubles.join(" "), circuit, self.since);
            if self.told.as_ref() == Some(&frame) {
                return None;
            }
            self.told.insert(frame).clone()
        };
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(frame: Option<Bytes>) -> String {
        frame.map_or_else(String::new, |frame| String::from_utf8_lossy(&frame).into_owned())
    }

    #[test]
    fn subscribers_hear_when_it_begins_and_when_all_of_it_is_over() {
        let mut service = Service::default();
        assert_eq!(service.set(Part::Log, None, 3), None);
        let told = text(service.set(Part::Log, Some("Disk.".into()), 7));
        let want = r#"{"type":"service_status","data":{"service":"event_broadcaster","status":"degraded","message":"Disk.","circuit_state":"closed","since":7}}"#;
        assert_eq!(told, want);
        assert_eq!(text(service.notice()), want);
        assert_eq!(service.set(Part::Log, Some("Disk.".into()), 8), None, "no news");
        service.set_circuit(Part::Supervised, "open");
        let told = text(service.set(Part::Supervised, Some("Port.".into()), 9));
        assert!(told.contains(r#""message":"Disk. Port.","circuit_state":"open","since":7"#), "{told}");
        assert!(text(service.set(Part::Log, None, 9)).contains(r#""message":"Port.""#));
        service.set_circuit(Part::Supervised, "closed");
        let told = text(service.set(Part::Supervised, None, 11));
        assert!(told.contains(r#""status":"healthy""#) && told.contains(r#""since":11"#), "{told}");
        assert_eq!(service.notice(), None);
    }
}
