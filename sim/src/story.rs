//! A run told to people.

use std::{collections::BTreeSet, fmt::Write as _};

use sim::{Note, Outcome};

/// Of one line.
const WIDTH: usize = 300;

/// Everything.
pub fn all(outcome: &Outcome) -> String {
    tell(outcome.notes.iter())
}

/// What happened to the orders that it went wrong for, and what struck meanwhile. Everything, where it went wrong for
/// no order in particular.
pub fn of_what_broke(outcome: &Outcome) -> String {
    let orders: BTreeSet<String> = outcome.broken.iter().flat_map(|row| ids(row)).collect();
    if orders.is_empty() && !outcome.broken.is_empty() {
        return all(outcome);
    }
    let concerned = |note: &&Note| {
        let what = plain(&note.what);
        orders.iter().any(|order| what.contains(order)) || matches!(note.who.as_ref(), "outside" | "alarm" | "operator")
    };
    tell(outcome.notes.iter().filter(concerned))
}

fn tell<'a>(notes: impl Iterator<Item = &'a Note>) -> String {
    let mut told = String::new();
    for note in notes {
        let end = note.what.char_indices().nth(WIDTH).map_or(note.what.len(), |(end, _)| end);
        let _ = writeln!(told, "{:>9.3}  {:<16} {}", note.at.as_secs_f64(), note.who, &note.what[..end]);
    }
    told
}

/// Ids are written with hyphens and without.
fn plain(text: &str) -> String {
    text.chars().filter(|c| *c != '-').collect()
}

/// The ids in a text.
fn ids(text: &str) -> Vec<String> {
    let plain = plain(text);
    let words = plain.split(|c: char| !c.is_ascii_hexdigit());
    words.filter(|word| word.len() == 32).map(str::to_owned).collect()
}
