//! What one request costs in instructions: the production binary under callgrind, for some requests and for more of them.
//! The difference is what the further ones cost, whatever else the machine does meanwhile, and whatever starting costs.
//!
//! Wall time is too noisy to notice that a path has become a twentieth dearer; instructions are not. What they do not see
//! is waiting: for a disk, a lock, another process. The benchmark does.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::{
    load::{Load, Pace, run},
    scenario::{Crowd, Deed, LONG_WINDOW, drain},
    site::{Manner, Servers, Site, Wiring},
};

/// Requests of the shorter run: past the first ones, which fill caches.
const FEW: u64 = 400;
/// Of the longer one. No more than the coordinator lets wait while nobody takes them from the stream.
const MANY: u64 = 1_600;
/// Of the longer one where a request costs so little that what the mesh does meanwhile by itself would show.
const MANY_CHEAP: u64 = 8_000;
/// A path that seems too dear is counted so often.
const ATTEMPTS: usize = 3;
/// Buyers at the same time. Enough for batches; they are the same in both runs.
const CONNECTIONS: usize = 32;

/// Its options.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The `seckill` to measure: a release build
    #[arg(long, default_value = "target/release/seckill", value_name = "FILE")]
    program: PathBuf,
    /// What each path may cost
    #[arg(long, default_value = "bench/budget.json", value_name = "FILE")]
    budget: PathBuf,
    /// Write what was measured as the new budget
    #[arg(long)]
    write: bool,
    /// How much dearer than its budget a path may be, in percent
    #[arg(long, default_value_t = 5, value_name = "PERCENT")]
    allow: u64,
    /// Keep what callgrind wrote of each longer run here, for `callgrind_annotate`
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
    /// Count this path only, whole, and compare it with nothing
    #[arg(long, value_name = "PATH", value_enum, conflicts_with_all = ["budget", "write"])]
    only: Option<Route>,
}

/// A path through the mesh, of one order. In this order: [`Route::Lock`] and [`Route::Pay`] begin with the path before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Route {
    /// Told that nothing is left.
    Soldout,
    /// A permit, a durable message, an answer. Nobody takes it from the stream.
    Accept,
    /// That, and locked by the funnel.
    Lock,
    /// That, and paid.
    Pay,
}

/// False when a path is dearer than its budget allows.
pub async fn counts(args: Args) -> Result<bool> {
    if let Some(keep) = &args.keep {
        fs::create_dir_all(keep).with_context(|| format!("making {}", keep.display()))?;
    }
    if let Some(route) = args.only {
        let whole = route.cost(&args).await?;
        println!("{} {whole} instructions an order, from its request to its end", route.name());
        return Ok(true);
    }
    // Read first: counting takes minutes.
    let budget = if args.write { None } else { Some(read_budget(&args.budget)?) };
    let mut counted = BTreeMap::new();
    let mut before = 0;
    let mut kept = true;
    for &route in Route::value_variants() {
        let name = route.name();
        let allowed = budget.as_ref().map(|budget| budget.get(&name).with_context(|| format!("no budget of {name}")));
        let allowed = allowed.transpose()?.copied();
        let mut whole = u64::MAX;
        let mut own = u64::MAX;
        // What is counted twice differs by some hundredths, with the sizes that batches happen to have: the least counts.
        for _ in 0..ATTEMPTS {
            whole = whole.min(route.cost(&args).await.with_context(|| format!("counting {name}"))?);
            // Each of these begins with what the one before it does.
            own = if matches!(route, Route::Lock | Route::Pay) { whole.saturating_sub(before) } else { whole };
            if allowed.is_none_or(|allowed| own * 100 <= allowed * (100 + args.allow)) {
                break;
            }
        }
        before = whole;
        if let Some(allowed) = allowed {
            let change = (own as f64 / allowed as f64 - 1.0) * 100.0;
            let is_dearer = own * 100 > allowed * (100 + args.allow);
            kept &= !is_dearer;
            let verdict = if is_dearer { "DEARER" } else { "ok" };
            println!("{name:<8} {own:>9} instructions an order, budget {allowed:>9}, {change:+5.1} %  {verdict}");
        } else {
            println!("{name:<8} {own:>9} instructions an order");
        }
        counted.insert(name, own);
    }
    if args.write {
        let text = serde_json::to_string_pretty(&counted)? + "\n";
        fs::write(&args.budget, text).with_context(|| format!("writing {}", args.budget.display()))?;
    }
    Ok(kept)
}

fn read_budget(path: &Path) -> Result<BTreeMap<String, u64>> {
    let budget = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&budget).with_context(|| format!("{} is no budget", path.display()))
}

impl Route {
    /// As the budget and the options call it.
    fn name(self) -> String {
        self.to_possible_value().expect("no path is skipped").get_name().to_owned()
    }

    /// Instructions of one more order.
    async fn cost(self, args: &Args) -> Result<u64> {
        let orders = if self == Route::Soldout { MANY_CHEAP } else { MANY };
        let few = self.run(&args.program, FEW, None).await?;
        let many = self.run(&args.program, orders, args.keep.as_deref()).await?;
        Ok(many.saturating_sub(few) / (orders - FEW))
    }

    /// Instructions of a mesh that serves so many orders, from its start to its end.
    async fn run(self, program: &Path, orders: u64, keep: Option<&Path>) -> Result<u64> {
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("callgrind.out");
        let mut manner = Manner {
            under: vec!["valgrind".into(), "--tool=callgrind".into(), "--quiet".into()],
            // One thread takes turns with nobody.
            settings: vec![("TOKIO_WORKER_THREADS".into(), "1".into())],
        };
        manner.under.push(format!("--callgrind-out-file={}", out.display()).into());
        if self == Route::Accept {
            manner.settings.push(("SECKILL_FUNNEL_WORKERS".into(), "0".into()));
        }
        let site = Site::start_as(manner, program, Wiring::Embedded, &Servers::default()).await?;
        let deed = match self {
            Route::Soldout => Deed::BeRefused,
            Route::Accept | Route::Lock => Deed::Place,
            Route::Pay => Deed::Pay,
        };
        let stock = if self == Route::Soldout { 1 } else { orders };
        let crowd = Crowd::gather(site, &["counted".to_owned()], (stock, LONG_WINDOW), deed).await?;
        let load = Load {
            pace: Pace::AtOnce(orders),
            connections: CONNECTIONS,
            warm_up: Duration::ZERO,
            length: Duration::from_secs(600),
        };
        let counted = run(load, crowd.site().address, 1, crowd.clone()).await;
        ensure!(counted.failed.is_empty(), "{:?}", counted.failed);
        ensure!(counted.latency.len() == orders, "{} of {orders} orders, {:?}", counted.latency.len(), counted.refused);
        if self != Route::Accept {
            drain(crowd.site()).await?;
        }
        let site = Crowd::leave(crowd)?;
        tokio::task::spawn_blocking(move || site.stop()).await??;
        let text = fs::read_to_string(&out).with_context(|| format!("reading {}", out.display()))?;
        if let Some(keep) = keep {
            fs::copy(&out, keep.join(format!("callgrind.out.{}", self.name())))
                .context("keeping what callgrind wrote")?;
        }
        let total = text.lines().find_map(|line| line.strip_prefix("summary: ")).context("callgrind's summary")?;
        total.trim().parse().context("a count")
    }
}
