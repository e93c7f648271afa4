//! Prints what the checks find: `cargo xtask model`.

use std::{process::ExitCode, time::Instant};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use model::{
    saga::{self, Bounds, Lapse},
    search::{Limits, Report, Verdict},
    stock::{self, Scope},
};
use stock_svc::domain::rules::Rule;

#[derive(Parser)]
#[command(name = "cargo xtask model", bin_name = "cargo xtask model")]
/// Searches every interleaving within small bounds, with the services' own functions as the steps.
///
/// Without a command: everything that CI searches, then each rule turned off, with the shortest way to where it is
/// missed. Fails when anything is found with all rules on, or nothing with one off.
struct Cli {
    /// Gives up a search after so many states
    #[arg(long, global = true, default_value_t = Limits::default().states)]
    states: usize,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Subcommand)]
enum What {
    /// The stock protocol within bounds of your own
    Stock(StockArgs),
    /// One order's saga within bounds of your own
    Saga(SagaArgs),
    /// The stock protocol's rules
    Rules,
}

#[derive(clap::Args)]
struct StockArgs {
    /// Units of the sale
    #[arg(long, default_value_t = 2)]
    units: i64,
    /// Buyers, each with one order of one unit
    #[arg(long, default_value_t = 2)]
    buyers: usize,
    /// How often permits are lost
    #[arg(long, default_value_t = 1)]
    wipes: u8,
    /// How many rebuilds begin
    #[arg(long, default_value_t = 2)]
    rebuilds: u8,
    /// Only the guard begins rebuilds, and only of permits that are lost or being rebuilt
    #[arg(long)]
    no_operators: bool,
    /// Orders may be closed that never held
    #[arg(long)]
    closes_unheld: bool,
    /// Also shows that every state comes to rest by what is bound to happen; takes twice the memory
    #[arg(long)]
    ends: bool,
    /// Rules to turn off, by name
    #[arg(long, value_parser = rule)]
    without: Vec<Rule>,
}

#[derive(clap::Args)]
struct SagaArgs {
    /// Attempts to pay
    #[arg(long, default_value_t = 2)]
    pays: u8,
    /// The buyer may cancel
    #[arg(long)]
    cancels: bool,
    /// How often the provider captures what it had given up
    #[arg(long, default_value_t = 0)]
    contradictions: u8,
    /// How often a rival takes the unit
    #[arg(long, default_value_t = 0)]
    rivals: u8,
    /// The order's grant is stale when the funnel comes to it
    #[arg(long)]
    stale: bool,
    /// How often an operator gives up on a payment
    #[arg(long, default_value_t = 0)]
    abandons: u8,
    /// Coordinators
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=3))]
    coordinators: u8,
}

fn rule(name: &str) -> Result<Rule, String> {
    let found = Rule::ALL.iter().find(|rule| rule.name().eq_ignore_ascii_case(name));
    found.copied().ok_or_else(|| format!("is no rule; `rules` lists them: {name}"))
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let limits = Limits { states: cli.states, ..Limits::default() };
    let good = match cli.what {
        None => everything(limits),
        Some(What::Stock(args)) => own_stock(&args, limits)?,
        Some(What::Saga(args)) => {
            let bounds = Bounds {
                name: "the order saga",
                pays: args.pays,
                cancels: args.cancels,
                contradictions: args.contradictions,
                rivals: args.rivals,
                stale: args.stale,
                abandons: args.abandons,
                coordinators: args.coordinators.into(),
                lapses: Vec::new(),
            };
            search_saga(&bounds, limits)
        }
        Some(What::Rules) => {
            for rule in Rule::ALL {
                println!("{:<28}{}", rule.name(), rule.sentence());
            }
            true
        }
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn own_stock(args: &StockArgs, limits: Limits) -> Result<bool> {
    let scope = Scope {
        operators: !args.no_operators,
        closes_unheld: args.closes_unheld,
        ends: args.ends,
        ..Scope::new(args.units, args.buyers, args.wipes, args.rebuilds)
    };
    anyhow::ensure!((1..=stock::ORDERS).contains(&args.buyers), "1 to {} buyers", stock::ORDERS);
    u8::try_from(args.units).context("that many units")?;
    let report = timed(&scope.name, limits, |limits, tell| stock::check(&scope, &args.without, limits, tell));
    show(&report.verdict, "    ");
    Ok(report.verdict == Verdict::Clean)
}

fn everything(limits: Limits) -> bool {
    println!("The stock protocol");
    let mut good = true;
    for scope in stock::scopes() {
        let report = timed(&scope.name, limits, |limits, tell| stock::check(&scope, &[], limits, tell));
        good &= expect(&report.verdict, Verdict::Clean);
    }
    println!("\nOne order's saga");
    for bounds in saga::bounds() {
        good &= search_saga(&bounds, limits);
    }
    println!("\nThe stock protocol without one of its rules");
    for rule in Rule::ALL {
        let report = stock::check(&stock::proof(*rule), &[*rule], limits, |_| {});
        good &= missed(rule.name(), rule.sentence(), &report);
    }
    println!("\nThe saga with something done wrong");
    for lapse in Lapse::ALL {
        let report = saga::check(&saga::proof(*lapse), limits, |_| {});
        good &= missed(&format!("{lapse:?}"), lapse.sentence(), &report);
    }
    println!("\n{}", if good { "clean, and every rule is needed" } else { "FAILED" });
    good
}

fn search_saga(bounds: &Bounds, limits: Limits) -> bool {
    let report = timed(bounds.name, limits, |limits, tell| saga::check(bounds, limits, tell));
    expect(&report.verdict, Verdict::Clean)
}

fn timed(name: &str, limits: Limits, search: impl FnOnce(Limits, &mut dyn FnMut(usize)) -> Report) -> Report {
    let begun = Instant::now();
    let report = search(limits, &mut |states| {
        eprint!("\r{} states after {:.0?} …", thousands(states), begun.elapsed());
    });
    eprint!("\r");
    let verdict = match &report.verdict {
        Verdict::Clean => "clean",
        Verdict::GaveUp => "GAVE UP",
        Verdict::Violation { .. } => "VIOLATED",
    };
    let (states, took) = (thousands(report.states), begun.elapsed().as_secs_f64());
    println!("  {name:<86} {states:>12} states  {:>3} deep  {took:>6.1} s  {verdict}", report.depth);
    report
}

/// Says what is not as expected.
fn expect(verdict: &Verdict, expected: Verdict) -> bool {
    if *verdict != expected {
        show(verdict, "    ");
    }
    *verdict == expected
}

/// Shows how a rule that is off is missed.
fn missed(name: &str, sentence: &str, report: &Report) -> bool {
    println!("  {name}: {sentence}");
    show(&report.verdict, "      ");
    matches!(report.verdict, Verdict::Violation { .. })
}

fn show(verdict: &Verdict, indent: &str) {
    match verdict {
        Verdict::Clean => println!("{indent}clean"),
        Verdict::GaveUp => println!("{indent}nothing as far as it went"),
        Verdict::Violation { what, trace } => {
            println!("{indent}{what}");
            for (step, text) in trace.iter().enumerate() {
                println!("{indent}{:>4}. {text}", step + 1);
            }
        }
    }
}

fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|g| std::str::from_utf8(g).ok()).collect();
    groups.join(",")
}
