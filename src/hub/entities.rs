//! Topics that an event is found under beside its own: one for each id that it names.
//!
//! With `entity_keys={"characteristic_ids": "characteristic/{id}"}` an event whose data holds `"characteristic_ids": [3, 7]`
//! matches subscriptions to `characteristic/3` and `characteristic/7`, as if each were its topic.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Stands for the id in the setting.
const ID: &str = "{id}";
/// Most keys: each field of an event is compared with them.
const MAX_KEYS: usize = 16;
/// Most ids of an event; each costs a search of its own.
pub const MAX_IDS: usize = 1024;

/// See the module. No keys name nothing, and cost nothing.
#[derive(Debug, Default)]
pub struct Entities(Vec<Key>);

#[derive(Debug)]
struct Key {
    name: String,
    before: String,
    after: String,
}

impl Entities {
    /// For fields by name, with their topics.
    ///
    /// # Errors
    /// What is wrong: with which setting, and what is allowed.
    pub fn new<'a>(keys: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, (String, String)> {
        let mut all = Vec::new();
        for (name, topic) in keys {
            let refused = |allowed: &str| Err((format!("{{'{name}': '{topic}'}}"), allowed.to_owned()));
            let Some((before, after)) = topic.split_once(ID).filter(|_| topic.contains('/')) else {
                return refused("a topic with a '/' and {id} in it, as 'camera/{id}'");
            };
            if name.is_empty() || after.contains(ID) {
                return refused("the name of a field, and a topic with {id} in it once");
            }
            if all.len() == MAX_KEYS {
                return refused(&format!("at most {MAX_KEYS} fields"));
            }
            all.push(Key { name: name.to_owned(), before: before.to_owned(), after: after.to_owned() });
        }
        Ok(Self(all))
    }

    /// Whether nothing is ever named.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The topics that an event names by ids in its own fields, or in those of its `data`: texts and whole numbers, alone or
    /// in a list.
    #[must_use]
    pub fn of(&self, json: &[u8]) -> Vec<Box<str>> {
        let mut topics = Vec::new();
        if !self.is_empty() {
            self.look_into(json, true, &mut topics);
        }
        topics
    }

    fn look_into(&self, object: &[u8], deeper: bool, topics: &mut Vec<Box<str>>) {
        // That the event is a JSON object was checked when it came: there is no error to find.
        drop(serde_json::Deserializer::from_slice(object).deserialize_map(Fields { entities: self, deeper, topics }));
    }
}

impl Key {
    /// Adds the topics of a value: an id, or a list of some. What is no id names nothing.
    fn name(&self, value: &str, topics: &mut Vec<Box<str>>) {
        let mut add = |id: &str| topics.push([&self.before, id, &self.after].concat().into());
        if value.starts_with('[') {
            let list: Vec<&RawValue> = serde_json::from_str(value).unwrap_or_default();
            list.iter().filter_map(|one| id(one.get())).for_each(|id| add(&id));
        } else if let Some(id) = id(value) {
            add(&id);
        }
    }
}

fn id(value: &str) -> Option<Cow<'_, str>> {
    match value.as_bytes().first()? {
        b'"' => serde_json::from_str(value).ok().map(Cow::Owned),
        b'-' | b'0'..=b'9' if !value.contains(['.', 'e', 'E']) => Some(value.into()),
        _ => None,
    }
}

/// The fields of an object, as they are read.
struct Fields<'a> {
    entities: &'a Entities,
    /// Whether `data` is looked into.
    deeper: bool,
    topics: &'a mut Vec<Box<str>>,
}

/// What a field is to us.
enum Field<'a> {
    Ids(&'a Key),
    Data,
    Other,
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(field) = map.next_key_seed(Name(&self.entities.0))? {
            match field {
                Field::Ids(key) => key.name(map.next_value::<&RawValue>()?.get(), self.topics),
                Field::Data if self.deeper => {
                    let data = map.next_value::<&RawValue>()?.get();
                    self.entities.look_into(data.as_bytes(), false, self.topics);
                }
                Field::Data | Field::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// Reads the name of a field.
struct Name<'a>(&'a [Key]);

impl<'de, 'a> DeserializeSeed<'de> for Name<'a> {
    type Value = Field<'a>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Field<'a>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'a> Visitor<'_> for Name<'a> {
    type Value = Field<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Field<'a>, E> {
        let known = self.0.iter().find(|key| key.name == name);
        Ok(known.map_or(if name == "data" { Field::Data } else { Field::Other }, Field::Ids))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entities(keys: &[(&'static str, &'static str)]) -> Entities {
        Entities::new(keys.iter().copied()).expect("valid")
    }

    #[test]
    fn ids_become_topics_wherever_they_stand_and_what_is_none_names_nothing() {
        let entities = entities(&[("characteristic_ids", "characteristic/{id}"), ("camera", "site/{id}/camera")]);
        let of = |json: &str| entities.of(json.as_bytes()).join(" ");
        let event =
            r#"{"type":"x","data":{"n":{"camera":1},"characteristic_ids": [ 3, "a\u0062", -7 ]},"camera":"north"}"#;
        assert_eq!(of(event), "characteristic/3 characteristic/ab characteristic/-7 site/north/camera");
        assert_eq!(
            of(r#"{"data":{"camera":12345678901234567890123},"characteristic_ids":4}"#),
            "site/12345678901234567890123/camera characteristic/4"
        );
        for nothing in ["null", "true", "1.5", "1e3", "{}", "[null,[1],{}]", "[]"] {
            assert_eq!(of(&format!(r#"{{"camera":{nothing}}}"#)), "", "{nothing}");
        }
        assert_eq!(of(r#"{"data":"camera"}"#) + &of(r#"{"data":[{"camera":1}]}"#), "");
        assert!(Entities::default().of(event.as_bytes()).is_empty());
    }

    #[test]
    fn settings_that_could_name_nothing_are_refused() {
        for (name, topic) in [("a", "b"), ("a", "b/c"), ("a", "{id}"), ("", "a/{id}"), ("a", "{id}/{id}")] {
            assert!(Entities::new([(name, topic)]).is_err(), "{name} {topic}");
        }
        let many: Vec<_> = (0..17).map(|n| n.to_string()).collect();
        assert!(Entities::new(many.iter().map(|name| (name.as_str(), "a/{id}"))).is_err());
    }
}
