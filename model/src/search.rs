//! A plain breadth-first search over every reachable state.
//!
//! States are small values that stand for interned ones, so that millions fit; a state is kept exactly, never as a mere
//! fingerprint, and is visited once for all states that differ from it only by who is who.

use std::{
    collections::HashMap,
    fmt::Display,
    hash::{BuildHasherDefault, Hash, Hasher},
};

/// Something with states and steps.
pub trait Model {
    /// A state. Small.
    type State: Copy + Eq + Hash;

    /// What can happen.
    type Action: Copy + Display;

    /// Where everything begins.
    fn start(&mut self) -> Self::State;

    /// Everything that can happen in a state. Steps that change nothing may be left out.
    fn steps(&mut self, state: Self::State, steps: &mut Vec<Step<Self>>);

    /// What must be so in every state; the error says what is not.
    fn check(&mut self, state: Self::State) -> Result<(), String>;

    /// The one among all states that differ from this one only by who is who.
    fn canonical(&mut self, state: Self::State) -> Self::State;

    /// Whether everything has come to its end: what every state must be able to reach by steps that are bound to
    /// happen. Asked only when [`Limits::ends`] is set.
    fn is_end(&mut self, state: Self::State) -> bool;
}

/// One thing that can happen.
pub struct Step<M: Model + ?Sized> {
    /// What.
    pub action: M::Action,
    /// Whether it is bound to happen sooner or later, by nobody's choice.
    pub bound: bool,
    /// The state after it, or why it must not happen.
    pub to: Result<M::State, String>,
}

/// How far to go.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Gives up after so many states.
    pub states: usize,
    /// Also shows that every state can come to an end.
    pub ends: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { states: 200_000_000, ends: false }
    }
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Different states seen.
    pub states: usize,
    /// Steps taken.
    pub steps: u64,
    /// The longest of the shortest ways to a state.
    pub depth: usize,
    /// What is wrong, and the shortest way to it.
    pub verdict: Verdict,
}

/// See [`Report`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing, anywhere.
    Clean,
    /// This.
    Violation {
        /// What is wrong.
        what: String,
        /// What happened, in order.
        trace: Vec<String>,
    },
    /// Nothing as far as it went.
    GaveUp,
}

/// Searches. `progress` is told now and then how many states were seen.
pub fn search<M: Model>(model: &mut M, limits: Limits, progress: &mut dyn FnMut(usize)) -> Report {
    let mut seen = Seen::new();
    let start = model.start();
    let first = model.canonical(start);
    seen.add(first, NOBODY);
    let (mut taken, mut depth, mut level_ends) = (0, 0, 1);
    let mut edges = Edges::default();
    let (mut steps, mut next, mut bounds, mut numbers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut index = 0;
    let report = |seen: &Seen<M::State>, taken, depth, verdict| Report {
        states: seen.states.len(),
        steps: taken,
        depth,
        verdict,
    };
    while index < seen.states.len() {
        if index == level_ends {
            depth += 1;
            level_ends = seen.states.len();
        }
        if index.is_multiple_of(1 << 20) && index > 0 {
            progress(index);
        }
        let state = seen.states[index];
        if let Err(what) = model.check(state) {
            let trace = replay(model, start, &seen.way(index));
            return report(&seen, taken, depth, Verdict::Violation { what, trace });
        }
        model.steps(state, &mut steps);
        taken += steps.len() as u64;
        next.clear();
        bounds.clear();
        for Step { action: _, bound, to } in steps.drain(..) {
            match to {
                Ok(to) => {
                    next.push(model.canonical(to));
                    bounds.push(bound);
                }
                Err(what) => {
                    let way = seen.way(index);
                    let mut trace = replay(model, start, &way);
                    let (last, what) = forbidden(model, start, &way).unwrap_or((String::new(), what));
                    trace.push(last);
                    return report(&seen, taken, depth, Verdict::Violation { what, trace });
                }
            }
        }
        seen.add_all(&next, index as u32, &mut numbers);
        if limits.ends {
            edges.add(numbers.iter().zip(&bounds).filter(|(_, bound)| **bound).map(|(to, _)| *to));
        }
        if seen.states.len() > limits.states {
            return report(&seen, taken, depth, Verdict::GaveUp);
        }
        index += 1;
    }
    if limits.ends
        && let Some(index) = edges.first_without_end(&seen.states.iter().map(|s| model.is_end(*s)).collect::<Vec<_>>())
    {
        let trace = replay(model, start, &seen.way(index));
        let what = "nothing that is bound to happen leads to an end from here".to_owned();
        return report(&seen, taken, depth, Verdict::Violation { what, trace });
    }
    report(&seen, taken, depth, Verdict::Clean)
}

/// No state came before the first.
const NOBODY: u32 = u32::MAX;

/// The states seen, in order, and from where each was seen first.
struct Seen<S> {
    states: Vec<S>,
    from: Vec<u32>,
    /// Indexes of states by their hash, in open addressing; the states themselves are not stored twice.
    slots: Vec<u32>,
}

impl<S: Copy + Eq + Hash> Seen<S> {
    fn new() -> Self {
        Self { states: Vec::new(), from: Vec::new(), slots: vec![NOBODY; 1 << 16] }
    }

    /// The indexes of these, whether they are new or not. Almost all of the search's time is waiting for memory that
    /// nothing else has touched for long: so everything that will be looked at is asked for first.
    fn add_all(&mut self, states: &[S], from: u32, indexes: &mut Vec<u32>) {
        let mask = self.slots.len() - 1;
        indexes.clear();
        indexes.extend(states.iter().map(|state| self.slots[hash_of(state) as usize & mask]));
        let same = states
            .iter()
            .zip(indexes.iter())
            .filter(|(state, index)| **index != NOBODY && self.states[**index as usize] == **state);
        std::hint::black_box(same.count());
        indexes.clear();
        for state in states {
            let index = self.add(*state, from);
            indexes.push(index);
        }
    }

    /// Its index, whether it is new or not.
    fn add(&mut self, state: S, from: u32) -> u32 {
        if self.states.len() * 5 > self.slots.len() * 3 {
            self.grow();
        }
        let mask = self.slots.len() - 1;
        let mut slot = hash_of(&state) as usize & mask;
        while self.slots[slot] != NOBODY {
            let known = self.slots[slot];
            if self.states[known as usize] == state {
                return known;
            }
            slot = (slot + 1) & mask;
        }
        let index = u32::try_from(self.states.len()).expect("fewer than four billion states");
        self.slots[slot] = index;
        self.states.push(state);
        self.from.push(from);
        index
    }

    fn grow(&mut self) {
        let size = self.slots.len() * 2;
        self.slots = vec![NOBODY; size];
        for (index, state) in self.states.iter().enumerate() {
            let mut slot = hash_of(state) as usize & (size - 1);
            while self.slots[slot] != NOBODY {
                slot = (slot + 1) & (size - 1);
            }
            self.slots[slot] = index as u32;
        }
    }

    /// The states on the way to this one, without the first.
    fn way(&self, mut index: usize) -> Vec<S> {
        let mut way = Vec::new();
        while self.from[index] != NOBODY {
            way.push(self.states[index]);
            index = self.from[index] as usize;
        }
        way.reverse();
        way
    }
}

/// Goes the way again without exchanging who is who, so that the same names mean the same through the whole trace.
fn walk<M: Model>(model: &mut M, start: M::State, way: &[M::State]) -> (M::State, Vec<String>) {
    let (mut state, mut trace, mut steps) = (start, Vec::new(), Vec::new());
    for next in way {
        model.steps(state, &mut steps);
        let taken = steps.drain(..).find_map(|step| {
            let to = step.to.ok()?;
            (model.canonical(to) == *next).then(|| (to, step.action.to_string()))
        });
        let Some((to, text)) = taken else { break };
        state = to;
        trace.push(text);
    }
    (state, trace)
}

fn replay<M: Model>(model: &mut M, start: M::State, way: &[M::State]) -> Vec<String> {
    walk(model, start, way).1
}

/// The step at the end of the way that must not happen.
fn forbidden<M: Model>(model: &mut M, start: M::State, way: &[M::State]) -> Option<(String, String)> {
    let (state, _) = walk(model, start, way);
    let mut steps = Vec::new();
    model.steps(state, &mut steps);
    steps.into_iter().find_map(|step| Some((step.action.to_string(), step.to.err()?)))
}

/// The bound steps, for showing that they lead to an end from everywhere.
#[derive(Default)]
struct Edges {
    /// Where each state's steps begin in `to`.
    begins: Vec<u64>,
    to: Vec<u32>,
}

impl Edges {
    /// The bound steps of the next state.
    fn add(&mut self, to: impl Iterator<Item = u32>) {
        self.begins.push(self.to.len() as u64);
        self.to.extend(to);
    }

    /// The first state from which no end can be reached.
    fn first_without_end(&self, is_end: &[bool]) -> Option<usize> {
        let count = is_end.len();
        // The same steps backwards: where those that lead to each state begin, then who they are.
        let mut begins = vec![0_u64; count + 1];
        for to in &self.to {
            begins[*to as usize + 1] += 1;
        }
        for index in 0..count {
            begins[index + 1] += begins[index];
        }
        let mut next = begins.clone();
        let mut from = vec![0_u32; self.to.len()];
        for index in 0..count {
            let end = self.begins.get(index + 1).copied().unwrap_or(self.to.len() as u64);
            for to in &self.to[self.begins[index] as usize..end as usize] {
                from[next[*to as usize] as usize] = index as u32;
                next[*to as usize] += 1;
            }
        }
        let mut reaches = is_end.to_vec();
        let mut open: Vec<u32> = (0..count as u32).filter(|index| is_end[*index as usize]).collect();
        while let Some(index) = open.pop() {
            let index = index as usize;
            for before in &from[begins[index] as usize..begins[index + 1] as usize] {
                if !reaches[*before as usize] {
                    reaches[*before as usize] = true;
                    open.push(*before);
                }
            }
        }
        reaches.iter().position(|reaches| !reaches)
    }
}

/// Values kept once, and known by a number.
#[derive(Debug)]
pub struct Interner<T> {
    values: Vec<T>,
    numbers: HashMap<T, u32, BuildHasherDefault<Quick>>,
}

impl<T: Clone + Eq + Hash> Default for Interner<T> {
    fn default() -> Self {
        Self { values: Vec::new(), numbers: HashMap::default() }
    }
}

impl<T: Clone + Eq + Hash> Interner<T> {
    /// Its number, and whether it is new.
    pub fn add(&mut self, value: T) -> (u32, bool) {
        if let Some(number) = self.numbers.get(&value) {
            return (*number, false);
        }
        let number = u32::try_from(self.values.len()).expect("fewer than four billion values");
        self.values.push(value.clone());
        self.numbers.insert(value, number);
        (number, true)
    }

    /// Its number.
    pub fn number(&mut self, value: &T) -> u32 {
        match self.numbers.get(value) {
            Some(number) => *number,
            None => self.add(value.clone()).0,
        }
    }

    /// The value.
    pub fn get(&self, number: u32) -> &T {
        &self.values[number as usize]
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// What a step came to before, by where it was taken.
pub type Memo<K, V> = HashMap<K, V, BuildHasherDefault<Quick>>;

/// A hash for keys that nobody chooses to collide: multiply and fold.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quick(u64);

impl Quick {
    fn mix(&mut self, word: u64) {
        let mixed = (self.0.rotate_left(23) ^ word).wrapping_add(0xF39C_C060_5CED_C835);
        let product = u128::from(mixed) * 0x9E37_79B9_7F4A_7C15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

impl Hasher for Quick {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word) ^ (chunk.len() as u64) << 56);
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.mix(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.mix(value as u64);
    }
}

fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = Quick(0x51_7C_C1_B7_27_22_0A_95);
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    /// Two counters that are raised in turns, and may be exchanged.
    struct Counters {
        forbidden: (u8, u8),
        stuck_at: Option<(u8, u8)>,
    }

    #[derive(Clone, Copy)]
    struct Raise(usize);

    impl fmt::Display for Raise {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "raise {}", self.0)
        }
    }

    impl Model for Counters {
        type State = (u8, u8);
        type Action = Raise;

        fn start(&mut self) -> (u8, u8) {
            (0, 0)
        }

        fn steps(&mut self, (a, b): (u8, u8), steps: &mut Vec<Step<Self>>) {
            if self.stuck_at == Some((a, b)) {
                return;
            }
            for (which, to) in [(0, (a + 1, b)), (1, (a, b + 1))] {
                if to.0 <= 3 && to.1 <= 3 {
                    steps.push(Step { action: Raise(which), bound: true, to: Ok(to) });
                }
            }
        }

        fn check(&mut self, state: (u8, u8)) -> Result<(), String> {
            if state == self.forbidden { Err("forbidden".to_owned()) } else { Ok(()) }
        }

        fn canonical(&mut self, (a, b): (u8, u8)) -> (u8, u8) {
            (a.min(b), a.max(b))
        }

        fn is_end(&mut self, state: (u8, u8)) -> bool {
            state == (3, 3)
        }
    }

    #[test]
    fn every_state_is_seen_once_whoever_is_who() {
        let mut model = Counters { forbidden: (9, 9), stuck_at: None };
        let report = search(&mut model, Limits { ends: true, ..Limits::default() }, &mut |_| {});
        assert_eq!((report.verdict, report.states, report.depth), (Verdict::Clean, 10, 6));
    }

    #[test]
    fn the_shortest_way_is_told_with_the_same_names_throughout() {
        let mut model = Counters { forbidden: (1, 2), stuck_at: None };
        let report = search(&mut model, Limits::default(), &mut |_| {});
        let Verdict::Violation { what, trace } = report.verdict else { panic!("{report:?}") };
        assert_eq!(what, "forbidden");
        assert_eq!(trace.len(), 3);
        assert!(trace.iter().any(|t| t == "raise 0") && trace.iter().any(|t| t == "raise 1"), "{trace:?}");
    }

    #[test]
    fn a_state_that_leads_nowhere_is_found() {
        let mut model = Counters { forbidden: (9, 9), stuck_at: Some((2, 2)) };
        let report = search(&mut model, Limits { ends: true, ..Limits::default() }, &mut |_| {});
        let Verdict::Violation { trace, .. } = report.verdict else { panic!("{report:?}") };
        assert_eq!(trace.len(), 4);
    }
}
