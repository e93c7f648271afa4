//! Chance, for spreading things out. Not for secrets.
//!
//! Drawn here and nowhere else, so that a test can fix what a thread draws and see the same run again.

#[cfg(any(test, feature = "testing"))]
use std::cell::RefCell;

use rand::Rng;
#[cfg(any(test, feature = "testing"))]
use rand::{SeedableRng, rngs::SmallRng};

#[cfg(any(test, feature = "testing"))]
thread_local! {
    static SEEDED: RefCell<Option<SmallRng>> = const { RefCell::new(None) };
}

/// Makes this thread draw what `seed` says from now on.
#[cfg(any(test, feature = "testing"))]
pub fn seed(seed: u64) {
    SEEDED.set(Some(SmallRng::seed_from_u64(seed)));
}

/// From 0 up to, but not including, 1.
pub fn fraction() -> f64 {
    draw(|rng| rng.random())
}

/// From `least` to `most`, both included.
pub fn between(least: u64, most: u64) -> u64 {
    draw(|rng| rng.random_range(least..=most))
}

fn draw<T>(from: impl FnOnce(&mut dyn rand::RngCore) -> T) -> T {
    #[cfg(any(test, feature = "testing"))]
    {
        SEEDED.with_borrow_mut(|seeded| match seeded {
            Some(rng) => from(rng),
            None => from(&mut rand::rng()),
        })
    }
    #[cfg(not(any(test, feature = "testing")))]
    from(&mut rand::rng())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same() {
        let draws = || {
            seed(7);
            [fraction(), between(1, 1_000) as f64, fraction()]
        };
        assert_eq!(draws(), draws());
        assert!((0.0..1.0).contains(&fraction()));
    }
}
