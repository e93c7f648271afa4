//! `seckill-bench`: sells to crowds and counts what was sold. It tells accepted from locked from paid, prints the
//! machine's own ceilings beside every figure, and declares void what the audit does not find clean.
//!
//! The mesh is the production binary in processes of its own, started fresh for every scenario; this program is its
//! client, and says what share of the machine it took itself.

mod baseline;
mod ceiling;
mod counts;
mod load;
mod report;
mod scenario;
mod site;
mod targets;
mod wire;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

use crate::{
    report::Report,
    scenario::{Extent, PAYING, Scenario},
    site::{Servers, Site, Wiring},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Sells to crowds and counts what was sold.
#[derive(Parser, Debug)]
#[command(name = "seckill-bench", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Measure ceilings and scenarios; write a report
    Run(RunArgs),
    /// Serve the echoes that are the ceiling of anything over HTTP and gRPC
    #[command(hide = true)]
    Echo {
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Count the instructions of the hot paths under callgrind, and hold them to the budget
    Counts(counts::Args),
    /// Serve the textbook design
    Baseline(Box<baseline::Args>),
}

#[derive(clap::Args, Clone, Debug)]
struct RunArgs {
    /// The `seckill` to measure
    #[arg(long, default_value = "target/release/seckill", value_name = "FILE")]
    program: PathBuf,
    /// Wirings, in this order
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["embedded", "real", "five"])]
    wiring: Vec<Wiring>,
    /// Scenarios, in this order, on every wiring
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["sell", "steady", "pay", "soldout", "rush", "hot100", "uniform", "abandon", "browse"])]
    scenario: Vec<Scenario>,
    /// Seconds that count, of every scenario
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Connections of the load
    #[arg(long, default_value_t = 256)]
    connections: usize,
    /// Orders a second that `sell` came to, for scenarios at a part of it where `sell` is not run. With one wiring only
    #[arg(long, value_name = "RATE", value_parser = clap::value_parser!(u32).range(1..))]
    peak: Option<u32>,
    /// Leave the ceilings of the backends out
    #[arg(long)]
    no_ceilings: bool,
    /// Leave the textbook design out
    #[arg(long)]
    no_baseline: bool,
    /// Where the report goes
    #[arg(long, default_value = "target/bench", value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    servers: Servers,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime starts");
    let outcome = runtime.block_on(async {
        match cli.verb {
            Verb::Run(args) => run(args).await,
            Verb::Counts(args) => counts::counts(args).await,
            Verb::Echo { listen } => ceiling::serve_echo(listen).await.map(|()| true),
            Verb::Baseline(args) => baseline::serve(*args).await.map(|()| true),
        }
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("seckill-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// For how long the echoes are measured each time.
const ECHO_FOR: Duration = Duration::from_secs(4);

/// False when a figure is void.
async fn run(args: RunArgs) -> Result<bool> {
    let RunArgs { program, wiring, scenario, seconds, connections, out, servers, .. } = args;
    let sells_at = scenario.iter().position(|scenario| *scenario == Scenario::Sell);
    for (at, scenario) in scenario.iter().enumerate().filter(|(_, scenario)| scenario.is_below_the_peak()) {
        let is_known = args.peak.is_some() || sells_at.is_some_and(|sells_at| sells_at < at);
        ensure!(is_known, "{scenario:?} comes at a part of the peak: run `sell` before it, or give `--peak`");
    }
    ensure!(args.peak.is_none() || wiring.len() == 1, "`--peak` is one wiring's: name it with `--wiring`");
    let extent = Extent { connections, length: Duration::from_secs(seconds) };
    let mut report =
        Report::new(format!("{connections} connections, {PAYING} times as many who pay, {seconds} s a scenario"));
    let echo = ceiling::Echo::start().await?;
    report.http_echo = echo.http(connections, ECHO_FOR).await?;
    report.grpc_echo = echo.grpc(ECHO_FOR).await?;
    println!("{}, commit {}", report.machine, report.commit);
    println!("ceilings           HTTP echo {:.0}/s, tonic echo {:.0}/s", report.http_echo, report.grpc_echo);
    let needs_servers = wiring.iter().any(|wiring| *wiring != Wiring::Embedded);
    if !args.no_ceilings {
        let dir = tempfile::tempdir()?;
        report.ceilings = ceiling::embedded(dir.path()).await?;
        if needs_servers {
            report.ceilings.extend(ceiling::real(&servers).await?);
        }
        for ceiling in &report.ceilings {
            println!("{:<50} {:>9.0}/s", ceiling.name, ceiling.rate);
        }
    }
    for wiring in wiring {
        let mut peak = args.peak.map(f64::from);
        let mut echoes = report.http_echo;
        for scenario in &scenario {
            if scenario.is_beside_the_echo() {
                echoes = echo.http(connections, ECHO_FOR).await?;
            }
            let site = Site::start(&program, wiring, &servers).await?;
            let mut figure = scenario.run(site, wiring, extent, (peak, echoes)).await?;
            if scenario.is_beside_the_echo() {
                // The machine is not the same from one minute to the next.
                let after = echo.http(connections, ECHO_FOR).await?;
                figure.echo = f64::midpoint(echoes, after);
                echoes = after;
            }
            if *scenario == Scenario::Sell {
                peak = Some(figure.rate);
            }
            report.add(figure);
        }
        if scenario.contains(&Scenario::Soldout) && report.soldout_grpc.is_none() {
            let site = Site::start(&program, wiring, &servers).await?;
            let before = echo.grpc(ECHO_FOR).await?;
            let (rate, audited) = scenario::soldout_grpc(site, extent.length).await?;
            report.grpc_echo = f64::midpoint(before, echo.grpc(ECHO_FOR).await?);
            if !audited {
                report.void.push("soldout over gRPC: the audit was not clean".to_owned());
            }
            let of_echo = rate / report.grpc_echo;
            println!("{:<18} {rate:>7.0}/s ({of_echo:.2} of the tonic echo)", "soldout over gRPC");
            report.soldout_grpc = Some(rate);
        }
    }
    if needs_servers && !args.no_baseline {
        let [accepted, locked] = baseline::measure(&servers, extent).await?;
        println!("{:<18} {accepted:>7.0}/s, locked {locked:.0}/s", "textbook design");
        report.baseline = Some([accepted, locked]);
    }
    for why in &report.void {
        println!("VOID: {why}");
    }
    for target in targets::targets(&report) {
        let (bound, verdict) = (target.bound(), target.verdict());
        println!("{:<50} {:>9.2}  {bound:<8} {:>7.2}  {verdict}", target.name, target.shown, target.wanted);
    }
    report.write(&out)?;
    println!("report             {}", out.join("bench.md").display());
    Ok(report.void.is_empty())
}
