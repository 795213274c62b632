//! Which groups of sessions want an entry: an index from patterns to groups, so that the cost of an event depends on
//! its own segments and on how many groups it reaches, and hardly on how many patterns there are.
//!
//! The patterns lie in two tries over segments, one for types and one for topics. A walk goes through the segments of
//! a name once and holds, at each depth, the nodes that its beginning can have led to; a node is reached by one path
//! only, so a walk never visits one twice and ends in at most as many steps as there are nodes.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::entry::{Filter, Record};
use super::registry::SessionId;
use crate::wire::subscriber::Carried;
use crate::wire::topic::{Pattern, Subject};

/// Position of a group in [`Groups`].
type GroupId = u32;

/// Sessions with equal filters, found by an entry.
#[derive(Debug, Default)]
pub struct Groups {
    ids: HashMap<Arc<Filter>, GroupId>,
    slots: Vec<Group>,
    free: Vec<GroupId>,
    index: Index,
    /// Counts the searches, so that a group is met once in each.
    search: u64,
    /// What the last search found; kept for its memory.
    found: Vec<GroupId>,
}

#[derive(Debug, Default)]
struct Group {
    filter: Arc<Filter>,
    members: Vec<SessionId>,
    /// The last search that met it.
    met: u64,
}

impl Groups {
    /// Adds a session that receives what the filter matches. The filter is not empty.
    pub fn join(&mut self, filter: &Arc<Filter>, member: SessionId) {
        if let Some(id) = self.ids.get(filter) {
            return self.slots[*id as usize].members.push(member);
        }
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Group::default());
            self.slots.len() as GroupId - 1
        });
        self.ids.insert(filter.clone(), id);
        for pattern in filter.patterns() {
            self.index.insert(pattern, id);
        }
        let slot = &mut self.slots[id as usize];
        slot.filter = filter.clone();
        slot.members.push(member);
    }

    /// Takes a session out; nothing happens if it is not in.
    pub fn leave(&mut self, filter: &Arc<Filter>, member: SessionId) {
        let Some(&id) = self.ids.get(filter) else { return };
        let group = &mut self.slots[id as usize];
        if let Some(at) = group.members.iter().position(|other| *other == member) {
            group.members.swap_remove(at);
        }
        if group.members.is_empty() {
            for pattern in filter.patterns() {
                self.index.remove(pattern, id);
            }
            self.ids.remove(filter);
            self.slots[id as usize] = Group::default();
            self.free.push(id);
        }
    }

    /// How many groups there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Calls `each` with the members of every group that wants the record, once for each group.
    pub fn for_each(&mut self, record: &Record, mut each: impl FnMut(&[SessionId])) {
        match record.carried() {
            // Everyone who listens: what is missing could have matched.
            Carried::Gap => self.slots.iter().filter(|group| !group.members.is_empty()).for_each(|g| each(&g.members)),
            Carried::Event => {
                self.search += 1;
                self.found.clear();
                self.index.find(record, &mut self.found);
                for id in &self.found {
                    let group = &mut self.slots[*id as usize];
                    if std::mem::replace(&mut group.met, self.search) != self.search {
                        each(&group.members);
                    }
                }
            }
        }
    }
}

/// One filter, to be held against many records.
#[derive(Debug)]
pub struct Matcher {
    filter: Arc<Filter>,
    /// Where the filter has so many patterns that an index is quicker than one after the other.
    index: Option<(Index, Vec<GroupId>)>,
}

impl Matcher {
    /// For this filter.
    #[must_use]
    pub fn new(filter: Arc<Filter>) -> Self {
        const FEW: usize = 8;
        let index = (filter.patterns().len() > FEW).then(|| {
            let mut index = Index::default();
            filter.patterns().iter().for_each(|pattern| index.insert(pattern, 0));
            (index, Vec::new())
        });
        Self { filter, index }
    }

    /// Whose it is.
    #[must_use]
    pub fn filter(&self) -> &Arc<Filter> {
        &self.filter
    }

    /// Whether the filter matches, see [`Filter::matches`].
    pub fn matches(&mut self, record: &Record) -> bool {
        match (&mut self.index, record.carried()) {
            (Some((index, found)), Carried::Event) => {
                found.clear();
                index.find(record, found);
                !found.is_empty()
            }
            _ => self.filter.matches(record),
        }
    }
}

/// From patterns to the groups that have them.
#[derive(Debug, Default)]
struct Index {
    /// Those that have `*`.
    all: Vec<GroupId>,
    kinds: Trie,
    topics: Trie,
}

impl Index {
    fn insert(&mut self, pattern: &Pattern, group: GroupId) {
        match pattern.subject() {
            Subject::All => self.all.push(group),
            Subject::Kind => self.kinds.insert(pattern.segments(), group),
            Subject::Topic => self.topics.insert(pattern.segments(), group),
        }
    }

    fn remove(&mut self, pattern: &Pattern, group: GroupId) {
        match pattern.subject() {
            Subject::All => take_out(&mut self.all, group),
            Subject::Kind => self.kinds.remove(pattern.segments(), group),
            Subject::Topic => self.topics.remove(pattern.segments(), group),
        }
    }

    /// Adds the groups with a matching pattern to `found`, as often as they have one.
    fn find(&mut self, event: &Record, found: &mut Vec<GroupId>) {
        found.extend_from_slice(&self.all);
        self.kinds.find(event.kind(), '.', found);
        self.topics.find(event.topic(), '/', found);
        for topic in event.entities() {
            self.topics.find(topic, '/', found);
        }
    }
}

type NodeId = u32;
/// Stands for a segment's text; equal texts have equal symbols.
type Symbol = u32;

const ROOT: NodeId = 0;

#[derive(Debug)]
struct Trie {
    /// Each text that stands in a pattern, and how many patterns' nodes have it above them.
    symbols: HashMap<Box<str>, (Symbol, u32), RandomState>,
    free_symbols: Vec<Symbol>,
    edges: HashMap<(NodeId, Symbol), NodeId, RandomState>,
    nodes: Vec<Node>,
    free_nodes: Vec<NodeId>,
    /// Where a walk stands; kept for their memory.
    here: Vec<NodeId>,
    next: Vec<NodeId>,
}

#[derive(Debug, Default)]
struct Node {
    /// Where `*` leads to; the root, which nothing leads to, stands for nowhere.
    star: NodeId,
    /// How many edges with a text go out.
    texts: u32,
    /// Patterns that end here.
    exact: Vec<GroupId>,
    /// Patterns that go on with a last `*`.
    rest: Vec<GroupId>,
}

impl Node {
    fn is_unused(&self) -> bool {
        self.star == ROOT && self.texts == 0 && self.exact.is_empty() && self.rest.is_empty()
    }
}

impl Default for Trie {
    fn default() -> Self {
        Self {
            symbols: HashMap::default(),
            free_symbols: Vec::new(),
            edges: HashMap::default(),
            nodes: vec![Node::default()],
            free_nodes: Vec::new(),
            here: Vec::new(),
            next: Vec::new(),
        }
    }
}

impl Trie {
    fn insert<'a>(&mut self, segments: impl Iterator<Item = &'a str>, group: GroupId) {
        let mut segments = segments.peekable();
        let mut at = ROOT;
        while let Some(segment) = segments.next() {
            if segment == "*" {
                if segments.peek().is_none() {
                    return self.nodes[at as usize].rest.push(group);
                }
                if self.nodes[at as usize].star == ROOT {
                    self.nodes[at as usize].star = self.new_node();
                }
                at = self.nodes[at as usize].star;
            } else {
                at = self.text_edge(at, segment);
            }
        }
        self.nodes[at as usize].exact.push(group);
    }

    /// The node behind an edge, made if it is not there.
    fn text_edge(&mut self, from: NodeId, segment: &str) -> NodeId {
        if let Some(to) = self.symbol(segment).and_then(|symbol| self.edges.get(&(from, symbol))) {
            return *to;
        }
        let to = self.new_node();
        let symbol = if let Some((symbol, uses)) = self.symbols.get_mut(segment) {
            *uses += 1;
            *symbol
        } else {
            let symbol = self.free_symbols.pop().unwrap_or(self.symbols.len() as Symbol);
            self.symbols.insert(segment.into(), (symbol, 1));
            symbol
        };
        self.nodes[from as usize].texts += 1;
        self.edges.insert((from, symbol), to);
        to
    }

    fn new_node(&mut self) -> NodeId {
        self.free_nodes.pop().unwrap_or_else(|| {
            self.nodes.push(Node::default());
            self.nodes.len() as NodeId - 1
        })
    }

    fn symbol(&self, segment: &str) -> Option<Symbol> {
        self.symbols.get(segment).map(|(symbol, _)| *symbol)
    }

    fn remove<'a>(&mut self, segments: impl Iterator<Item = &'a str>, group: GroupId) {
        let mut segments = segments.peekable();
        let mut way = Vec::new(); // from where, over which text (or `*`)
        let mut at = ROOT;
        while let Some(segment) = segments.next() {
            if segment == "*" && segments.peek().is_none() {
                take_out(&mut self.nodes[at as usize].rest, group);
                return self.prune(at, way);
            }
            let text = (segment != "*").then_some(segment);
            let to = match text {
                None => Some(self.nodes[at as usize].star).filter(|to| *to != ROOT),
                Some(text) => self.symbol(text).and_then(|symbol| self.edges.get(&(at, symbol)).copied()),
            };
            let Some(to) = to else { return };
            way.push((at, text));
            at = to;
        }
        take_out(&mut self.nodes[at as usize].exact, group);
        self.prune(at, way);
    }

    /// Removes the nodes at the end of a way that nothing needs any more.
    fn prune(&mut self, mut at: NodeId, mut way: Vec<(NodeId, Option<&str>)>) {
        while self.nodes[at as usize].is_unused() {
            let Some((from, text)) = way.pop() else { return };
            self.nodes[at as usize] = Node::default();
            self.free_nodes.push(at);
            match text {
                None => self.nodes[from as usize].star = ROOT,
                Some(text) => self.forget_edge(from, text),
            }
            at = from;
        }
    }

    fn forget_edge(&mut self, from: NodeId, text: &str) {
        let Some((symbol, uses)) = self.symbols.get_mut(text) else { return };
        let symbol = *symbol;
        *uses -= 1;
        if *uses == 0 {
            self.symbols.remove(text);
            self.free_symbols.push(symbol);
        }
        self.nodes[from as usize].texts -= 1;
        self.edges.remove(&(from, symbol));
    }

    fn find(&mut self, name: &str, separator: char, found: &mut Vec<GroupId>) {
        if name.is_empty() || self.nodes[ROOT as usize].is_unused() {
            return;
        }
        self.here.clear();
        self.here.push(ROOT);
        for segment in name.split(separator) {
            let mut symbol = None; // looked up for the first node that has edges
            self.next.clear();
            for at in &self.here {
                let node = &self.nodes[*at as usize];
                found.extend_from_slice(&node.rest);
                if node.star != ROOT {
                    self.next.push(node.star);
                }
                if node.texts > 0 {
                    let symbols = &self.symbols;
                    let symbol = symbol.get_or_insert_with(|| symbols.get(segment).map(|(symbol, _)| *symbol));
                    self.next.extend(symbol.and_then(|symbol| self.edges.get(&(*at, symbol))));
                }
            }
            std::mem::swap(&mut self.here, &mut self.next);
            if self.here.is_empty() {
                return;
            }
        }
        for at in &self.here {
            found.extend_from_slice(&self.nodes[*at as usize].exact);
        }
    }
}

/// Removes one occurrence.
fn take_out(groups: &mut Vec<GroupId>, group: GroupId) {
    if let Some(at) = groups.iter().position(|other| *other == group) {
        groups.swap_remove(at);
    }
}

#[cfg(test)]
mod tests;
