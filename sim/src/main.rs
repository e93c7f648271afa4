//! `cargo xtask sim`: many seeds, or one with its story.

mod story;

use std::{
    collections::BTreeMap,
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use clap::Parser;
use sim::{Outcome, run};

/// Runs the whole mesh from seeds, with faults at every port, and checks what became of it.
#[derive(Parser)]
#[command(name = "cargo xtask sim", bin_name = "cargo xtask sim")]
struct Args {
    /// How many seeds
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Only this one, with its story: what happened to the orders that it went wrong for
    #[arg(long, conflicts_with_all = ["seeds", "first"])]
    seed: Option<u64>,
    /// With everything that happened, to anybody
    #[arg(long, requires = "seed")]
    everything: bool,
    /// Go on after a failure
    #[arg(long)]
    keep_going: bool,
    /// How many at once; half as many more than there are cores by default, since each now and then waits for its database's
    /// thread
    #[arg(long)]
    threads: Option<usize>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_writer(std::io::stderr).init();
    }
    match args.seed {
        Some(seed) => one(seed, args.everything),
        None => many(&args),
    }
}

/// One seed again, with its story.
fn one(seed: u64, everything: bool) -> anyhow::Result<ExitCode> {
    let outcome = run(seed, true)?;
    let told = if everything { story::all(&outcome) } else { story::of_what_broke(&outcome) };
    print!("{told}");
    println!("seed {seed}: {} orders in {:?}, fingerprint {:x}", outcome.orders, outcome.took, outcome.fingerprint);
    println!("{}", verdict(seed, &outcome));
    Ok(if outcome.broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn verdict(seed: u64, outcome: &Outcome) -> String {
    if outcome.broken.is_empty() {
        return format!("seed {seed}: clean");
    }
    let rows: Vec<String> = outcome.broken.iter().map(|row| format!("seed {seed}: BROKEN {row}")).collect();
    rows.join("\n")
}

#[derive(Default)]
struct Total {
    runs: u64,
    orders: usize,
    failed: Vec<u64>,
    faults: BTreeMap<String, u64>,
}

fn many(args: &Args) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let next = AtomicU64::new(args.first);
    let stop = AtomicBool::new(false);
    let total = Mutex::new(Total::default());
    let threads = match args.threads {
        Some(threads) => threads.max(1),
        None => std::thread::available_parallelism().map_or(1, |cores| cores.get() + cores.get().div_ceil(2)),
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= args.first + args.seeds {
                        return;
                    }
                    let outcome = match run(seed, false) {
                        Ok(outcome) => outcome,
                        Err(error) => {
                            eprintln!("seed {seed} could not be run: {error:#}");
                            total.lock().unwrap_or_else(PoisonError::into_inner).failed.push(seed);
                            stop.store(true, Ordering::Relaxed);
                            return;
                        }
                    };
                    let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
                    total.add(seed, &outcome);
                    if outcome.broken.is_empty() {
                        continue;
                    }
                    println!("{}", verdict(seed, &outcome));
                    println!("again: cargo xtask sim --seed {seed}");
                    if !args.keep_going && !stop.swap(true, Ordering::Relaxed) {
                        // The same seed is the same run.
                        match run(seed, true) {
                            Ok(again) => print!("{}", story::of_what_broke(&again)),
                            Err(error) => eprintln!("seed {seed} could not be run again: {error:#}"),
                        }
                    }
                }
            });
        }
    });
    let total = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!();
    for (kind, count) in &total.faults {
        println!("{count:>9}  {kind}");
    }
    let (runs, orders, failed) = (total.runs, total.orders, total.failed.len());
    println!("{runs} seeds, {orders} accepted orders, {failed} failed, in {:.1} s", began.elapsed().as_secs_f64());
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Total {
    fn add(&mut self, seed: u64, outcome: &Outcome) {
        self.runs += 1;
        self.orders += outcome.orders;
        if !outcome.broken.is_empty() {
            self.failed.push(seed);
        }
        for ((fault, port), count) in &outcome.faults {
            *self.faults.entry(format!("{port:?}: {fault:?}")).or_default() += count;
        }
        for (disaster, count) in &outcome.disasters {
            *self.faults.entry(format!("{disaster:?}")).or_default() += count;
        }
    }
}
