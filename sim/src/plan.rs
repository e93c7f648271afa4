//! What a seed decides before the run begins: the sale, its buyers, the weather.
//!
//! Every seed switches some kinds of fault off altogether: a fault is best found where not everything else hides it.

use std::{collections::BTreeMap, time::Duration};

use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};

use crate::{
    faults::{Disaster, Port, Rates},
    net::Role,
};

/// How long things go wrong.
pub const STORM: Duration = Duration::from_secs(12);

/// Replicas of each role.
pub const REPLICAS: usize = 2;

/// A disaster to come.
#[derive(Clone, Copy, Debug)]
pub struct Strike {
    pub at: Duration,
    pub disaster: Disaster,
    pub role: Role,
    pub replica: usize,
    pub lasts: Duration,
}

/// What an operator does.
#[derive(Clone, Copy, Debug)]
pub enum Verb {
    Pause,
    Open,
    Close,
    Adjust(i64),
    Rebuild,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Plan {
    pub stock: i64,
    pub limit: i64,
    pub window: Duration,
    pub buyers: usize,
    /// Within this time all buyers come.
    pub rush: Duration,
    pub rates: BTreeMap<Port, Rates>,
    pub strikes: Vec<Strike>,
    pub verbs: Vec<(Duration, Verb)>,
    pub stock_config: stock_svc::Config,
    pub coordinator_config: coordinator::Config,
    pub payment_config: payment_svc::Config,
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        // Not the numbers that the run itself draws.
        let mut rng = SmallRng::seed_from_u64(seed ^ 0x5eed_5eed);
        let rng = &mut rng;
        let ms = |least: u64, most: u64, rng: &mut SmallRng| Duration::from_millis(rng.random_range(least..=most));
        let pick = |of: &[u64], rng: &mut SmallRng| *of.choose(rng).expect("a choice");
        let rates = [Port::Store, Port::Permits, Port::Bus, Port::Link, Port::Provider]
            .into_iter()
            .map(|port| (port, weather(port, rng)))
            .collect();
        Self {
            stock: rng.random_range(1..=6),
            limit: rng.random_range(1..=2),
            window: ms(1_000, 5_000, rng),
            buyers: rng.random_range(4..=16),
            rush: ms(10, 7_000, rng),
            rates,
            strikes: strikes(rng),
            verbs: verbs(rng),
            stock_config: stock_svc::Config {
                grant_grace: Duration::from_millis(pick(&[200, 1_000, 3_000, 10_000], rng)),
                rebuild_takeover: Duration::from_millis(pick(&[500, 2_000, 10_000], rng)),
                ..Default::default()
            },
            coordinator_config: coordinator::Config {
                ack_wait_ms: pick(&[500, 2_000, 10_000], rng),
                saga_lease_ms: pick(&[300, 1_000, 5_000], rng),
                settle_grace_ms: pick(&[100, 1_000], rng) as i64,
                charge_timeout_ms: pick(&[400, 3_000], rng),
                saga_retry_cap_ms: 3_000,
                ..Default::default()
            },
            payment_config: payment_svc::Config {
                provider_timeout: Duration::from_millis(pick(&[300, 1_500], rng)),
                ..Default::default()
            },
        }
    }

    /// Whether nothing in it can lose permits, or leave too many.
    pub fn permits_are_safe(&self) -> bool {
        let loses = |strike: &Strike| matches!(strike.disaster, Disaster::KvWiped | Disaster::KvSetBack);
        let moves = |(_, verb): &(Duration, Verb)| matches!(verb, Verb::Adjust(_));
        !self.strikes.iter().any(loses) && !self.verbs.iter().any(moves)
    }

    /// Whether permits can be what they were before.
    pub fn sets_permits_back(&self) -> bool {
        self.strikes.iter().any(|strike| strike.disaster == Disaster::KvSetBack)
    }
}

fn weather(port: Port, rng: &mut SmallRng) -> Rates {
    let rate = |rng: &mut SmallRng| *[0, 0, 5, 20, 60].choose(rng).expect("a choice");
    let mut rates = Rates {
        lost: rate(rng) / 4,
        failed_before: rate(rng),
        failed_after: rate(rng),
        delayed: rate(rng) * 2,
        duplicated: rate(rng),
        reordered: rate(rng) * 3,
        longest: Duration::from_millis(*[100, 1_000, 4_000].choose(rng).expect("a choice")),
    };
    if !matches!(port, Port::Link | Port::Bus) {
        (rates.duplicated, rates.reordered) = (0, 0);
    }
    if port == Port::Link {
        rates.reordered = 0;
    }
    rates
}

fn strikes(rng: &mut SmallRng) -> Vec<Strike> {
    let count = *[0, 1, 3, 6].choose(rng).expect("a choice");
    let kinds =
        [Disaster::Crash, Disaster::Crash, Disaster::Freeze, Disaster::KvWiped, Disaster::KvSetBack, Disaster::BusAway];
    let mut strikes: Vec<Strike> = (0..count)
        .map(|_| Strike {
            at: Duration::from_millis(rng.random_range(300..STORM.as_millis() as u64)),
            disaster: *kinds.choose(rng).expect("a kind"),
            role: *Role::ALL.choose(rng).expect("a role"),
            replica: rng.random_range(0..REPLICAS),
            lasts: Duration::from_millis(rng.random_range(50..5_000)),
        })
        .collect();
    strikes.sort_by_key(|strike| strike.at);
    strikes
}

fn verbs(rng: &mut SmallRng) -> Vec<(Duration, Verb)> {
    let count = *[0, 0, 1, 3].choose(rng).expect("a choice");
    let mut verbs: Vec<(Duration, Verb)> = Vec::new();
    for _ in 0..count {
        let at = Duration::from_millis(rng.random_range(200..STORM.as_millis() as u64));
        match rng.random_range(0..8) {
            0 | 1 => {
                verbs.push((at, Verb::Pause));
                verbs.push((at + Duration::from_millis(rng.random_range(100..2_000)), Verb::Open));
            }
            2 => verbs.push((at, Verb::Close)),
            3 => verbs.push((at, Verb::Rebuild)),
            _ => {
                let delta = *[-2, -1, 1, 2].choose(rng).expect("a choice");
                verbs.push((at, Verb::Adjust(delta)));
            }
        }
    }
    verbs.sort_by_key(|(at, _)| *at);
    verbs
}
