//! What was done to the mesh, and how long it took to get over it.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::faults::Kind;

/// One fault.
#[derive(Debug)]
pub struct Row {
    /// Since the run began.
    pub at: Duration,
    /// Its kind.
    pub kind: Kind,
    /// What it hit.
    pub detail: String,
    /// From its beginning to its end.
    pub down: Duration,
    /// From the restart's beginning to ready, of whoever took longest.
    pub ready: Option<Duration>,
    /// From the restart's beginning until an order that was placed since is locked.
    pub recovered: Option<Duration>,
    /// The longest time without a lock, from the fault's beginning on.
    pub silence: Duration,
    /// Processes killed.
    pub kills: usize,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, kind, detail, down, ready, recovered, silence, .. } = self;
        let (ready, recovered) = (seconds(*ready), seconds(*recovered));
        write!(
            f,
            "{:>7.1} s  {kind:<13} down {:>5.1} s  ready {ready}  locking {recovered}  silence {:>5.1} s  {detail}",
            at.as_secs_f64(),
            down.as_secs_f64(),
            silence.as_secs_f64()
        )
    }
}

/// Everything that was done.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Report {
    /// One more fault, told as it happens.
    pub fn add(&mut self, row: Row) {
        println!("{row}");
        self.rows.push(row);
    }

    /// Something worth knowing that breaks no promise.
    pub fn note(&mut self, note: String) {
        eprintln!("note       {note}");
        self.notes.push(note);
    }

    /// How many processes were killed.
    pub fn kills(&self) -> usize {
        self.rows.iter().map(|row| row.kills).sum()
    }
}

impl fmt::Display for Report {
    /// The table of recovery times: each kind's median and worst.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} faults, {} kills", self.rows.len(), self.kills())?;
        writeln!(
            f,
            "{:<14} {:>5}  {:<17} {:<17} {:<17}",
            "fault", "times", "ready", "locking again", "longest silence"
        )?;
        let mut kinds: BTreeMap<Kind, Vec<&Row>> = BTreeMap::new();
        for row in &self.rows {
            kinds.entry(row.kind).or_default().push(row);
        }
        for (kind, rows) in kinds {
            let ready = spread(rows.iter().filter_map(|row| row.ready));
            let recovered = spread(rows.iter().filter_map(|row| row.recovered));
            let silence = spread(rows.iter().map(|row| row.silence));
            writeln!(f, "{kind:<14} {:>5}  {ready:<17} {recovered:<17} {silence:<17}", rows.len())?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        write!(
            f,
            "each: median / worst; ready and locking again count from the restart, or from when the fault was lifted"
        )
    }
}

fn spread(times: impl Iterator<Item = Duration>) -> String {
    let mut times: Vec<_> = times.collect();
    times.sort();
    match times.last() {
        Some(worst) => format!("{:.2} / {:.2} s", times[times.len() / 2].as_secs_f64(), worst.as_secs_f64()),
        None => "–".to_owned(),
    }
}

fn seconds(time: Option<Duration>) -> String {
    time.map_or("    –  ".to_owned(), |time| format!("{:>5.2} s", time.as_secs_f64()))
}
