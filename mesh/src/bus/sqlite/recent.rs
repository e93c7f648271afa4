//! The message ids of the last two minutes, as fingerprints in memory.
//!
//! On disk they would be an index in random order: four fifths of the cost of a publish, and most of the writing. After
//! a restart they are read back from the messages. A fingerprint has 128 bits under keys that nobody knows: that two
//! ids share one is not going to happen. An id costs 70 bytes at most, 5,000 a second for two minutes 42 MB.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use tokio::time::Instant;

/// How long a duplicate is recognised, like on a server.
pub(super) const WINDOW: Duration = Duration::from_secs(120);

/// Not a `u128`, whose alignment would cost a third more.
type Fingerprint = [u64; 2];

/// What one stream remembers.
#[derive(Debug, Default)]
pub(super) struct Recent {
    keys: [RandomState; 2],
    sequences: HashMap<Fingerprint, u64>,
    ages: VecDeque<(Instant, Vec<Fingerprint>)>,
}

impl Recent {
    /// The sequence of a message with this id.
    pub(super) fn find(&self, id: &str) -> Option<u64> {
        self.sequences.get(&self.fingerprint(id)).copied()
    }

    /// Remembers an id that was not there, from `now` on. Time must not go backwards.
    pub(super) fn remember(&mut self, now: Instant, id: &str, sequence: u64) {
        let fingerprint = self.fingerprint(id);
        self.sequences.insert(fingerprint, sequence);
        match self.ages.back_mut() {
            Some((at, fingerprints)) if *at == now => fingerprints.push(fingerprint),
            _ => self.ages.push_back((now, vec![fingerprint])),
        }
    }

    /// Forgets what is old enough.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((_, fingerprints)) = self.ages.pop_front_if(|(at, _)| now - *at > WINDOW) {
            for fingerprint in fingerprints {
                self.sequences.remove(&fingerprint);
            }
        }
        if self.sequences.is_empty() && self.sequences.capacity() > 0 {
            self.sequences = HashMap::new();
        }
    }

    /// Forgets what came after `last`: it was rolled back.
    pub(super) fn truncate(&mut self, last: u64) {
        self.sequences.retain(|_, sequence| *sequence <= last);
        for (_, fingerprints) in &mut self.ages {
            fingerprints.retain(|fingerprint| self.sequences.contains_key(fingerprint));
        }
    }

    fn fingerprint(&self, id: &str) -> Fingerprint {
        self.keys.each_ref().map(|key| key.hash_one(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_known_for_two_minutes() {
        let mut recent = Recent::default();
        let start = Instant::now();
        recent.remember(start, "a", 1);
        recent.remember(start, "b", 2);
        recent.remember(start + WINDOW / 2, "c", 3);
        recent.expire(start + WINDOW);
        assert_eq!([recent.find("a"), recent.find("c"), recent.find("d")], [Some(1), Some(3), None]);
        recent.expire(start + WINDOW + Duration::from_millis(1));
        assert_eq!([recent.find("a"), recent.find("b"), recent.find("c")], [None, None, Some(3)]);
    }

    #[test]
    fn what_was_rolled_back_is_not_known_and_lives_its_whole_time_when_it_comes_again() {
        let mut recent = Recent::default();
        let start = Instant::now();
        recent.remember(start, "a", 1);
        recent.remember(start, "b", 2);
        recent.truncate(1);
        assert_eq!([recent.find("a"), recent.find("b")], [Some(1), None]);
        recent.remember(start + WINDOW, "b", 2);
        recent.expire(start + WINDOW * 3 / 2);
        assert_eq!([recent.find("a"), recent.find("b")], [None, Some(2)]);
    }
}
