//! A few seeds, for whoever runs the tests; `cargo xtask sim` runs as many as one likes.

use std::sync::atomic::{AtomicU64, Ordering};

/// A minute's worth, on two cores and without optimisation.
const SEEDS: u64 = 80;

#[test]
fn every_seed_comes_to_a_good_end() {
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| some(&next))).collect();
        let orders: usize = workers.into_iter().map(|worker| worker.join().expect("no seed failed")).sum();
        // Otherwise nothing was tried.
        assert!(orders as u64 > SEEDS, "{orders} orders were accepted in {SEEDS} seeds");
    });
}

fn some(next: &AtomicU64) -> usize {
    let mut orders = 0;
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= SEEDS {
            return orders;
        }
        let outcome = sim::run(seed, false).expect("it can be run");
        assert!(outcome.broken.is_empty(), "cargo xtask sim --seed {seed}\n{:#?}", outcome.broken);
        orders += outcome.orders;
    }
}

/// Or what fails could not be looked at again.
#[test]
fn the_same_seed_is_the_same_run() {
    let fingerprints = |seed| [false, true].map(|detailed| sim::run(seed, detailed).expect("it runs").fingerprint);
    for seed in 1_000..1_006 {
        let [once, again] = fingerprints(seed);
        assert_eq!(once, again, "seed {seed}");
    }
    assert_ne!(fingerprints(1_000), fingerprints(1_001));
}
