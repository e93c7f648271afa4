//! Real faults on real processes: PostgreSQL, Redis, NATS and two of every role, killed, stopped, cut off and restarted
//! while buyers come.
//!
//! Promises: a run is clean or it fails; clean means that no answer was outside the API's table, that every accepted
//! order ended, that the mesh accepted and locked again after every fault, and that the audit at rest finds nothing.
//! The order of the faults and what they hit follows from the seed, which is printed; their timing is the machine's.

pub mod faults;
pub mod fleet;
pub mod load;
pub mod proxy;
pub mod report;
pub mod scenarios;
pub mod servers;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use rand::{Rng, SeedableRng, rngs::StdRng};
use seckill::{audit, config::StorageArgs};

use self::{
    faults::{Card, Kind},
    fleet::{Fleet, Plan, Role},
    load::Load,
    report::Report,
    servers::Keeper,
};

/// What accepted orders are given to end after the last buyer has gone.
const END_LIMIT: Duration = Duration::from_secs(120);

/// Options of a run. `cargo xtask chaos` starts the servers and passes where they are.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask chaos --", about = "Breaks a running mesh and proves that nothing came of it")]
pub struct Args {
    /// How long faults go on. One round of every fault takes about five minutes
    #[arg(long, default_value_t = 10.0)]
    pub minutes: f64,
    /// What to do; without it, every fault by turns
    #[arg(long, value_enum)]
    pub scenario: Option<Scenario>,
    /// Decides which faults come when, what they hit and what buyers do; a new one when not given
    #[arg(long)]
    pub seed: Option<u64>,
    /// Buyers a second
    #[arg(long, default_value_t = 40.0)]
    pub rate: f64,
    /// Orders of the scenarios that count them: in-flight, awaiting, expiry
    #[arg(long)]
    pub orders: Option<usize>,
    /// The program whose processes are broken; the one beside this program when not given
    #[arg(long)]
    pub program: Option<PathBuf>,
    /// Where the processes' logs go
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub logs: PathBuf,
    /// The socket of whoever keeps the servers
    #[arg(long, env = "SECKILL_CHAOS_KEEPER", default_value = "keeper.sock", hide = true)]
    pub keeper: PathBuf,
    /// The servers.
    #[command(flatten)]
    pub storage: StorageArgs,
}

/// One fault by turns, or a measurement by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// Only this kind of fault.
    Only(Kind),
    /// A measurement.
    Measure(Measurement),
}

/// What is measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Measurement {
    /// Coordinators killed with 10,000 orders in flight: all move again within five seconds of the restart
    InFlight,
    /// Coordinators restarted with 100,000 orders awaiting payment: ready within five seconds
    Awaiting,
    /// Unpaid orders expire on time, 10,000 or as many as asked for (E19)
    Expiry,
    /// The disk of an embedded mesh fills up and is emptied again
    DiskFull,
}

impl ValueEnum for Scenario {
    fn value_variants<'a>() -> &'a [Self] {
        use Scenario::{Measure, Only};
        &[
            Only(Kind::KillReplica),
            Only(Kind::KillRole),
            Only(Kind::KillServer),
            Only(Kind::KillPair),
            Only(Kind::Zombie),
            Only(Kind::RedisFlush),
            Only(Kind::RedisBack),
            Only(Kind::NatsAway),
            Only(Kind::Network),
            Only(Kind::Rolling),
            Measure(Measurement::InFlight),
            Measure(Measurement::Awaiting),
            Measure(Measurement::Expiry),
            Measure(Measurement::DiskFull),
        ]
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        match self {
            Scenario::Only(kind) => kind.to_possible_value(),
            Scenario::Measure(measurement) => measurement.to_possible_value(),
        }
    }
}

/// A mesh being broken.
pub struct Chaos {
    fleet: Fleet,
    keeper: Keeper,
    load: Load,
    storage: StorageArgs,
    rng: StdRng,
    report: Report,
    started: Instant,
    /// Whether orders are left that end long after the run: the audit then is of a mesh at work.
    leaves_orders: bool,
}

/// The whole run. False when something was violated.
pub async fn run(args: Args) -> Result<bool> {
    let seed = args.seed.unwrap_or_else(|| rand::random_range(0..1_000_000));
    println!("seed {seed}");
    let program = match &args.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().context("finding this program")?.with_file_name("e2e-seckill"),
    };
    if args.scenario == Some(Scenario::Measure(Measurement::DiskFull)) {
        return scenarios::disk_full(&program, &args.logs, args.rate, seed).await;
    }
    let mut chaos = Chaos::start(&program, &args.storage, &args.logs, &args.keeper, seed).await?;
    match args.scenario {
        Some(Scenario::Measure(Measurement::InFlight)) => chaos.in_flight(args.orders.unwrap_or(10_000)).await?,
        Some(Scenario::Measure(Measurement::Awaiting)) => chaos.awaiting(args.orders.unwrap_or(100_000)).await?,
        Some(Scenario::Measure(Measurement::Expiry)) => chaos.expiry(args.orders.unwrap_or(10_000)).await?,
        Some(Scenario::Measure(Measurement::DiskFull)) => {}
        Some(Scenario::Only(kind)) => chaos.by_turns(&args, |card| card.kind() == kind).await?,
        None => chaos.by_turns(&args, |_| true).await?,
    }
    chaos.verdict().await
}

impl Chaos {
    /// A mesh of two replicas a role, whole, with nobody at its doors.
    pub async fn start(program: &Path, storage: &StorageArgs, logs: &Path, keeper: &Path, seed: u64) -> Result<Self> {
        let fleet = Fleet::start(Plan { program, storage, replicas: 2, logs }).await?;
        let load = Load::at(&fleet.doors(), seed)?;
        Ok(Self {
            fleet,
            keeper: Keeper::at(keeper),
            load,
            storage: storage.clone(),
            rng: StdRng::seed_from_u64(seed),
            report: Report::default(),
            started: Instant::now(),
            leaves_orders: false,
        })
    }

    /// Faults for as long as it was asked for, by turns.
    async fn by_turns(&mut self, args: &Args, wanted: impl Fn(&Card) -> bool) -> Result<()> {
        let end = self.started + Duration::from_secs_f64(args.minutes * 60.0);
        let mut deck: Vec<Card> = Vec::new();
        let next = |rng: &mut StdRng| {
            if Instant::now() >= end {
                return None;
            }
            if deck.is_empty() {
                deck = Kind::deck(rng);
                deck.retain(&wanted);
            }
            deck.pop()
        };
        self.faults(args.rate, next).await
    }

    /// One fault after the other, until there is none, while buyers come at this rate.
    pub async fn faults(&mut self, rate: f64, mut next: impl FnMut(&mut StdRng) -> Option<Card>) -> Result<()> {
        self.load.open().await?;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let load = self.load.clone();
        let buyers = tokio::spawn(async move {
            load.run(rate, async {
                // Dropped is stopped.
                let _ = stopped.await;
            })
            .await;
        });
        while let Some(card) = next(&mut self.rng) {
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(1000..3000))).await;
            // Boxed: the futures of a fault are more than the compiler looks through at once.
            Box::pin(self.inject(card)).await?;
        }
        drop(stop);
        buyers.await.context("the buyers")
    }

    fn revive(&mut self) -> Result<()> {
        for death in self.fleet.revive()? {
            if death.was_ready {
                self.load.violation(death.what.clone());
            }
            self.report.note(death.what);
        }
        Ok(())
    }

    /// Waits for every accepted order to end, asks for the audit, and says what came of it all.
    /// False when something was violated.
    pub async fn verdict(mut self) -> Result<bool> {
        self.revive()?;
        println!("\nthe last buyer has gone; waiting for what was accepted");
        let ends = self.load.all_end(END_LIMIT).await;
        self.load.sold_out_is_sold().await;
        let source = audit::Source::new(&self.storage, None)?;
        if let Err(last) = clean(&source, !self.leaves_orders).await? {
            self.load.violation(format!("the audit is not clean:\n{last}"));
        }
        println!("\n{}\n", self.report);
        println!("{}", self.load.summary());
        println!("ended      {ends:?}");
        let violations = self.load.violations();
        match violations.len() {
            0 => println!("clean: every accepted order ended, no undocumented answer, the audit finds nothing"),
            count => {
                println!("{count} VIOLATIONS");
                for violation in violations.iter().take(load::TOLD) {
                    println!("  {violation}");
                }
            }
        }
        Ok(violations.is_empty())
    }
}

/// The audit, again until it is clean or patience is over: refunds and permits settle behind the orders. An error is its
/// last report.
pub(crate) async fn clean(source: &audit::Source, at_rest: bool) -> Result<Result<(), String>> {
    let deadline = Instant::now() + END_LIMIT;
    loop {
        // Boxed: the futures of three databases, layer upon layer, are more than the compiler looks through at once.
        let report = Box::pin(audit::run(source, at_rest)).await.context("the audit")?;
        if report.is_clean() {
            println!("{report}");
            return Ok(Ok(()));
        }
        if Instant::now() > deadline {
            return Ok(Err(report.to_string()));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
