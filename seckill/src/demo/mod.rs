//! `seckill demo`: a sale, a rush of buyers through the real gateway, the outcome, the audit.
//!
//! The buyers are real clients: HTTP to the gateway, tokens of their own, one idempotency key per intent. With
//! `--gateway` they visit a mesh that runs elsewhere; without, a whole mesh is started for them in a temporary folder
//! (or on the backends named) and stopped after the audit.

mod buyer;
pub mod client;
mod report;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Args;
use futures::{StreamExt, stream};
use http::{HeaderValue, Method};
use mesh::{
    identity::{Minter, Secret},
    lifecycle::Lifecycle,
};
use rand::seq::SliceRandom;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{
    buyer::{Identities, Rush, Temper},
    client::Client,
    report::Tally,
};
use crate::{
    assembly::{Mesh, Options},
    audit,
    config::{CommonArgs, RoleConfigs, StorageArgs},
    tools,
};

/// Options of `seckill demo`.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Visit the mesh whose gateway is here, instead of starting one.
    #[arg(long, env = "SECKILL_GATEWAY", value_name = "URL")]
    pub gateway: Option<http::Uri>,
    /// How many buyers press the button at once.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub buyers: u32,
    /// How many units there are.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub stock: u32,
    /// How long a unit is held for payment. In a rush of many thousand orders five seconds are not enough for most to pay.
    #[arg(long, default_value = "15s", value_parser = mesh::duration::parse)]
    pub payment_window: Duration,
    /// Of 100 who hold a unit, how many pay. The rest of 100 walk away.
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub pay: u8,
    /// Of 100 who hold a unit, how many have their payment declined.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub decline: u8,
    /// Of 100 who hold a unit, how many cancel.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub cancel: u8,
    /// How long a buyer keeps trying while all units are held.
    #[arg(long, default_value = "90s", value_parser = mesh::duration::parse)]
    pub patience: Duration,
    /// Connections that the buyers share.
    #[arg(long, default_value_t = 128)]
    pub connections: usize,
    /// Stop after the audit. Otherwise a mesh started for the demo stays up to be looked at, until Ctrl-C.
    #[arg(long)]
    pub once: bool,
    /// What every process has.
    #[command(flatten)]
    pub common: CommonArgs,
    /// The roles' own options.
    #[command(flatten)]
    pub roles: RoleConfigs,
}

/// Runs the demo. False when something that must hold did not.
pub async fn run(mut args: DemoArgs, life: &Lifecycle) -> anyhow::Result<bool> {
    ensure!(args.pay + args.decline + args.cancel <= 100, "--pay, --decline and --cancel add up to more than 100");
    if let Some(gateway) = args.gateway.clone() {
        let storage = &args.common.storage;
        let minter = tools::minter(&args.common.auth, &storage.data_dir)?;
        return hold(&args, &gateway, &minter, None, life).await;
    }
    // Without a place named, the whole sale lives and dies in a temporary folder.
    let temporary = tempfile::tempdir().context("no temporary folder")?;
    if args.common.storage.data_dir == StorageArgs::default().data_dir {
        args.common.storage.data_dir = temporary.path().to_owned();
    }
    if args.common.auth.auth_hs256_secret.is_none() {
        args.common.auth.auth_hs256_secret = Some(Secret::random());
    }
    let listen: SocketAddr = ([127, 0, 0, 1], 0).into();
    let options =
        Options { common: args.common.clone(), listen, admin_listen: Some(listen), roles: args.roles.clone() };
    let mesh = Mesh::start(options, life).await?;
    let gateway: http::Uri = format!("http://{}", mesh.address).parse()?;
    println!("mesh       all five roles in this process, gateway at {gateway}");
    let minter = mesh.minter.as_ref().context("a demo needs an HS256 key, not a JWKS")?;
    let clean = hold(&args, &gateway, minter, Some(&mesh), life).await;
    if !args.once && clean.is_ok() && !life.is_stopping() {
        println!("the mesh stays up at {gateway} until Ctrl-C");
        life.stopping().await;
    }
    mesh.stop(args.common.shutdown_grace).await;
    clean
}

/// Holds one sale.
async fn hold(
    args: &DemoArgs,
    gateway: &http::Uri,
    minter: &Minter,
    mesh: Option<&Mesh>,
    life: &Lifecycle,
) -> anyhow::Result<bool> {
    let run = Uuid::new_v4().simple().to_string()[..8].to_owned();
    let identities = Identities { minter: minter.clone(), run };
    let operator = identities.mint("demo-operator", "operator")?;
    let client = Client::new(gateway, args.connections)?;
    // Waiting takes no work, only patience.
    let waiting = Client::new(gateway, args.connections * 2)?;
    let paying = Client::new(gateway, args.connections)?;
    // Never behind the crowd, or it would see nothing of it.
    let watching = Client::new(gateway, 1)?;
    let sale = create_sale(args, &client, &operator).await?;
    let tempers = tempers(args);
    println!(
        "sale       sales/{sale}: {} units for {} buyers, {:?} to pay; of 100 who hold one {} pay, {} are declined, \
         {} cancel, the rest walk away",
        args.stock, args.buyers, args.payment_window, args.pay, args.decline, args.cancel
    );

    let start = Instant::now();
    let rush = Arc::new(Rush {
        identities,
        client: client.clone(),
        waiting,
        paying,
        sale: sale.clone(),
        start,
        patience: start + args.patience,
        tally: Tally::default(),
    });
    let over = CancellationToken::new();
    let stock = Arc::new(StockWatch::default());
    let watch = stock.clone().watch(watching, sale.clone(), operator.clone(), i64::from(args.stock), over.clone());
    let watching = tokio::spawn(watch);
    let progress = tokio::spawn(show_progress(rush.clone(), stock.clone(), over.clone()));
    let mut visits = tokio::task::JoinSet::new();
    let visited = async {
        for (buyer, temper) in (0..).zip(tempers) {
            let turn = client.turn().await?;
            visits.spawn(buyer::visit(rush.clone(), turn, buyer, temper));
            // Whoever has gone home takes no more room.
            while let Some(done) = visits.try_join_next() {
                done.context("a buyer crashed")??;
            }
        }
        while let Some(done) = visits.join_next().await {
            done.context("a buyer crashed")??;
        }
        anyhow::Ok((await_ends(args, &rush).await, stock.at_rest(&rush, &operator).await))
    };
    let (unfinished, rest) = tokio::select! {
        visited = visited => visited?,
        () = life.stopping() => bail!("interrupted"),
    };
    over.cancel();
    watching.await?;
    progress.await?;

    println!("{}", rush.tally.report(args.stock as usize));
    let report = audit::run(&audit::Source::new(&args.common.storage, mesh)?, true).await?;
    println!("{report}");
    let verdicts = [
        (unfinished == 0, format!("no order left unfinished ({unfinished} are)")),
        (rest, "permits equal to available stock at rest (I2)".to_owned()),
        (
            stock.violations() == 0,
            format!(
                "held and sold at most {} at every one of {} samples (most: {}, I1 and I2 broken in {})",
                args.stock,
                stock.samples(),
                stock.most(),
                stock.violations()
            ),
        ),
        (report.is_clean(), "audit clean".to_owned()),
    ];
    for (holds, what) in &verdicts {
        println!("{}   {what}", if *holds { "yes" } else { "NO " });
    }
    let sold = rush.tally.count("PAID");
    println!("sold {sold} of {} units; resident memory of this process at most {} MiB", args.stock, peak_memory_mib());
    Ok(verdicts.iter().all(|(holds, _)| *holds))
}

async fn create_sale(args: &DemoArgs, client: &Client, operator: &HeaderValue) -> anyhow::Result<String> {
    let body = serde_json::json!({
        "requestId": Uuid::new_v4().to_string(),
        "saleId": format!("demo-{}", &Uuid::new_v4().simple().to_string()[..8]),
        "title": "A demonstration",
        "price": {"currencyCode": "EUR", "units": "19", "nanos": 990_000_000},
        "stock": args.stock.to_string(),
        "perBuyerLimit": "1",
        "paymentWindow": format!("{}s", args.payment_window.as_secs_f64()),
    });
    let answer = client.send(Method::POST, "/v1/sales", operator, None, Some(body.to_string().into())).await?;
    ensure!(answer.status.is_success(), "the sale was not created: {}", String::from_utf8_lossy(&answer.body));
    let name = answer.json()["name"].as_str().unwrap_or_default().to_owned();
    Ok(name.strip_prefix("sales/").context("the sale has no name")?.to_owned())
}

/// Exactly the proportions asked for, shuffled over the buyers.
fn tempers(args: &DemoArgs) -> Vec<Temper> {
    let share = |percent: u8| args.buyers as usize * usize::from(percent) / 100;
    let mut all = vec![Temper::WalksAway; args.buyers as usize];
    let bounds = [
        (share(args.pay), Temper::Pays),
        (share(args.decline), Temper::Declines),
        (share(args.cancel), Temper::Cancels),
    ];
    let mut at = 0;
    for (count, temper) in bounds {
        all[at..at + count].fill(temper);
        at += count;
    }
    all.shuffle(&mut rand::rng());
    all
}

/// Asks every order left open until it has ended, oldest first. Answers how many have not within the window and a
/// generous bound.
async fn await_ends(args: &DemoArgs, rush: &Rush) -> usize {
    let deadline = Instant::now() + args.payment_window + Duration::from_secs(30);
    let ended = stream::iter(rush.tally.take_open()).map(|(order, buyer)| async move {
        let Ok(token) = rush.identities.token(buyer) else { return false };
        let path = format!("/v1/{order}");
        loop {
            let answer = buyer::insist(rush, &rush.client, Method::GET, &path, &token, None, "").await;
            let state = answer.map(|a| buyer::state_of(&a)).unwrap_or_default();
            if buyer::is_terminal(&state) {
                rush.tally.ended(&state);
                return true;
            }
            if Instant::now() > deadline {
                eprintln!("{order} is still {state}");
                return false;
            }
            tokio::time::sleep(Duration::from_millis(rand::random_range(500..1500))).await;
        }
    });
    ended.buffer_unordered(args.connections).filter(|ended| std::future::ready(!ended)).count().await
}

/// Looks at the stock all the while, as an operator would.
#[derive(Debug, Default)]
struct StockWatch {
    samples: AtomicU64,
    violations: AtomicU64,
    most: AtomicI64,
    last: std::sync::Mutex<String>,
}

impl StockWatch {
    async fn watch(
        self: Arc<Self>,
        client: Client,
        sale: String,
        operator: HeaderValue,
        stock: i64,
        over: CancellationToken,
    ) {
        while !over.is_cancelled() {
            if let Some(report) = read_stock(&client, &sale, &operator).await {
                self.samples.fetch_add(1, Ordering::Relaxed);
                let taken = report.held + report.sold;
                self.most.fetch_max(taken, Ordering::Relaxed);
                let broken = taken > stock || report.available < 0 || report.available + taken != report.total;
                if broken {
                    eprintln!("broken: {report:?}");
                    self.violations.fetch_add(1, Ordering::Relaxed);
                }
                let line = format!("available {}, held {}, sold {}", report.available, report.held, report.sold);
                *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = line;
            }
            tokio::select! {
                () = over.cancelled() => {}
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
        }
    }

    /// Waits until every permit is back where the ledger has it.
    async fn at_rest(&self, rush: &Rush, operator: &HeaderValue) -> bool {
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            match read_stock(&rush.client, &rush.sale, operator).await {
                Some(report) if report.held == 0 && report.permits == report.available => return true,
                _ => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
        false
    }

    fn samples(&self) -> u64 {
        self.samples.load(Ordering::Relaxed)
    }

    fn violations(&self) -> u64 {
        self.violations.load(Ordering::Relaxed)
    }

    fn most(&self) -> i64 {
        self.most.load(Ordering::Relaxed)
    }

    fn line(&self) -> String {
        self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

/// The ledger beside the permits, as `GetStock` tells it.
#[derive(Debug)]
struct StockReport {
    total: i64,
    available: i64,
    held: i64,
    sold: i64,
    permits: i64,
}

async fn read_stock(client: &Client, sale: &str, operator: &HeaderValue) -> Option<StockReport> {
    let answer = client.send(Method::GET, &format!("/v1/sales/{sale}/stock"), operator, None, None).await.ok()?;
    if !answer.status.is_success() {
        return None;
    }
    let json = answer.json();
    let number = |key: &str| json[key].as_str().and_then(|n| n.parse().ok());
    Some(StockReport {
        total: number("total")?,
        available: number("available")?,
        held: number("held")?,
        sold: number("sold")?,
        permits: number("permits")?,
    })
}

async fn show_progress(rush: Arc<Rush>, stock: Arc<StockWatch>, over: CancellationToken) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.tick().await;
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let seconds = rush.start.elapsed().as_secs();
                println!("{seconds:>4} s     {}; {}", rush.tally.progress(), stock.line());
            }
            () = over.cancelled() => return,
        }
    }
}

/// The most memory this process ever had resident, by the kernel's count.
fn peak_memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).unwrap_or_default() / 1024
}
