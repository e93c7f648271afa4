//! What buyers do to the mesh, and what is counted of it.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use proto::v1::{PlaceOrderRequest, orders_client::OrdersClient};
use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    ceiling::saturate,
    load::{Counted, Load, Outcome, Pace, Visit, run},
    site::{Site, Wiring, cpu_of},
    wire::{Connection, Request},
};

/// Enough for whatever a scenario sells.
const PLENTY: u64 = 50_000_000;
/// Longer than a run.
pub const LONG_WINDOW: Duration = Duration::from_secs(3600);
/// The payment window where nobody pays: at a quarter of ten thousand orders a second, a hundred thousand are pending.
const ABANDONED_AFTER: Duration = Duration::from_secs(40);
/// Who pays comes three times, so that it takes three times as many buyers to keep a mesh as busy.
pub const PAYING: usize = 3;
/// Accepted orders are locked within this once the load has ended, or the figure is void.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// A scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scenario {
    /// Enough stock for all, one sale: accepted and locked.
    Sell,
    /// The same, and every buyer pays.
    Pay,
    /// The same as `sell`, at half of its peak: the latencies.
    Steady,
    /// Only refusals: the sale is empty for good.
    Soldout,
    /// 100,000 buyers at once for 1,000 units.
    Rush,
    /// `sell` over a hundred sales.
    Hot100,
    /// `sell` over a thousand sales.
    Uniform,
    /// Nobody pays: every unit comes back and is sold again. At a quarter of the peak, since a unit that comes back costs
    /// as much as one that is sold.
    Abandon,
    /// Looking at the sale and the list of sales.
    Browse,
}

/// What a scenario came to.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Which.
    pub scenario: Scenario,
    /// On what.
    pub wiring: Wiring,
    /// What is counted as good, a second: accepted, refused, paid, read.
    pub rate: f64,
    /// HTTP echoes a second: shortly before, and where the ratio is a target, on the mean of before and after.
    pub echo: f64,
    /// Orders locked in the ledger a second, over the same time.
    pub locked: Option<f64>,
    /// From the intended start to the answer, in milliseconds: p50, p99, p99.9.
    pub latency_ms: [f64; 3],
    /// PLACED to AWAITING_PAYMENT, p99 at most, in milliseconds.
    pub locked_within_ms: Option<f64>,
    /// Deadline to expiry, and release to the permit's return, p99 at most each, in milliseconds.
    pub back_within_ms: Option<[f64; 2]>,
    /// The start to the last unit being held, in milliseconds.
    pub all_held_after_ms: Option<f64>,
    /// CPU seconds a second: the load's own, the mesh's processes.
    pub cores: [f64; 2],
    /// The mesh's largest resident size, in MiB.
    pub peak_mib: f64,
    /// Refusals by reason.
    pub refused: BTreeMap<String, u64>,
    /// Undocumented answers: void if there is any.
    pub failed: BTreeMap<String, u64>,
    /// Good visits in each second, and their p99 in milliseconds.
    pub seconds: Vec<(u64, f64)>,
    /// Whether the audit was clean; a figure without is void.
    pub audited: bool,
}

/// How long and how much.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Connections of the load.
    pub connections: usize,
    /// Counted time of a scenario.
    pub length: Duration,
}

/// Counts the orders that the stream has taken.
const ACCEPTED: &str = r#"seckill_bus_published_total{stream="ORDERS"}"#;
/// Counts those of them that the funnel has written.
const WRITTEN: &str = "seckill_placed_to_locked_seconds_count";

const WARM_UP: Duration = Duration::from_secs(3);
const SELL_FOR: Duration = Duration::from_secs(60);

/// How a scenario is played.
struct Play {
    sales: u64,
    /// Units of each sale.
    stock: u64,
    /// For payment.
    window: Duration,
    /// What visitors come for.
    deed: Deed,
    load: Load,
}

impl Scenario {
    /// Whether its target is a part of the echo.
    pub fn is_beside_the_echo(self) -> bool {
        matches!(self, Scenario::Sell | Scenario::Soldout)
    }

    /// Whether buyers come at a part of `sell`'s peak, which has to be known then.
    pub fn is_below_the_peak(self) -> bool {
        matches!(self, Scenario::Steady | Scenario::Abandon)
    }

    fn play(self, Extent { connections, length }: Extent, peak: Option<f64>) -> Result<Play> {
        let of_the_peak = |part: f64| Ok::<_, anyhow::Error>(part * peak.context("the peak of `sell` is not known")?);
        let load = Load { pace: Pace::Saturating, connections, warm_up: WARM_UP, length };
        let plain = Play { sales: 1, stock: PLENTY, window: LONG_WINDOW, deed: Deed::Place, load };
        Ok(match self {
            // A minute tells whether locking keeps up with accepting.
            Scenario::Sell => Play { load: Load { length: length.max(SELL_FOR), ..load }, ..plain },
            Scenario::Steady => Play { load: Load { pace: Pace::PerSecond(of_the_peak(0.5)?), ..load }, ..plain },
            Scenario::Pay => {
                Play { deed: Deed::Pay, load: Load { connections: PAYING * connections, ..load }, ..plain }
            }
            Scenario::Soldout => Play { stock: 1, deed: Deed::BeRefused, ..plain },
            Scenario::Rush => Play { stock: 1_000, load: Load { pace: Pace::AtOnce(100_000), ..load }, ..plain },
            Scenario::Hot100 => Play { sales: 100, ..plain },
            Scenario::Uniform => Play { sales: 1_000, ..plain },
            // As many units as are sold within a window: who comes later buys what has come back. Counted once every unit
            // has been held.
            Scenario::Abandon => {
                let rate = of_the_peak(0.25)?;
                let stock = (rate * ABANDONED_AFTER.as_secs_f64()) as u64;
                let load = Load { pace: Pace::PerSecond(rate), warm_up: ABANDONED_AFTER + WARM_UP, ..load };
                Play { stock, window: ABANDONED_AFTER, load, ..plain }
            }
            Scenario::Browse => Play { deed: Deed::Browse, ..plain },
        })
    }

    /// Runs on a fresh mesh, stops it and audits what it left. `peak` is what `sell` came to on the same wiring, `echo`
    /// what the echo did shortly before.
    pub async fn run(
        self,
        site: Site,
        wiring: Wiring,
        extent: Extent,
        (peak, echo): (Option<f64>, f64),
    ) -> Result<Figure> {
        let Play { sales, stock, window, deed, load } = self.play(extent, peak)?;
        let sales: Vec<String> = (0..sales).map(|n| format!("sale-{n}")).collect();
        let crowd = Crowd::gather(site, &sales, (stock, window), deed).await?;
        let site = crowd.site.clone();

        let watch = Arc::new(tokio::sync::Notify::new());
        let all_held =
            (self == Scenario::Rush).then(|| tokio::spawn(held_after(site.clone(), sales[0].clone(), stock)));
        let before = Snapshot::take(&site).await?;
        let marked = tokio::spawn(Snapshot::after_warm_up(site.clone(), load, watch.clone()));
        let counted = run(load, site.address, 1, crowd.clone()).await;
        watch.notify_one();
        let (from, to) = marked.await??;
        let whole = Snapshot::take(&site).await?;
        let (from, to) = if self == Scenario::Rush { (before, whole) } else { (from, to) };
        let seconds = (to.at - from.at).as_secs_f64();
        let locked = to.metrics.grown(&from.metrics, WRITTEN) / seconds;
        let within = |name, q| to.metrics.quantile(&from.metrics, name, q).map(|s| s * 1000.0);
        let places = !matches!(self, Scenario::Soldout | Scenario::Browse);
        let back = (self == Scenario::Abandon)
            .then(|| {
                let late = within("seckill_deadline_lateness_seconds", 0.99)?;
                Some([late, within("seckill_release_to_refund_seconds", 0.99)?])
            })
            .flatten();
        let cores = [(to.own - from.own).as_secs_f64() / seconds, (to.mesh - from.mesh).as_secs_f64() / seconds];
        let all_held_after_ms = match all_held {
            Some(task) => Some(task.await??.as_secs_f64() * 1000.0),
            None => None,
        };
        drain(&site).await?;
        let peak_mib = site.peak_mib()?;
        drop(site);
        let site = Crowd::leave(crowd)?;
        let (audited, told) = tokio::task::spawn_blocking(move || site.stop_and_audit()).await??;
        if !audited {
            eprintln!("{told}");
        }
        Ok(Figure {
            scenario: self,
            wiring,
            rate: counted.rate(),
            echo,
            locked: places.then_some(locked),
            latency_ms: [0.5, 0.99, 0.999].map(|q| counted.quantile(q)),
            locked_within_ms: places.then(|| within("seckill_placed_to_locked_seconds", 0.99)).flatten(),
            back_within_ms: back,
            all_held_after_ms,
            cores,
            peak_mib,
            seconds: per_second(&counted),
            refused: counted.refused,
            failed: counted.failed,
            audited,
        })
    }
}

fn per_second(counted: &Counted) -> Vec<(u64, f64)> {
    counted.seconds.values().map(|h| (h.len(), h.value_at_quantile(0.99) as f64 / 1000.0)).collect()
}

/// What the mesh had counted and used at one moment.
struct Snapshot {
    at: Instant,
    metrics: crate::site::Metrics,
    own: Duration,
    mesh: Duration,
}

impl Snapshot {
    async fn take(site: &Site) -> Result<Self> {
        let metrics = site.metrics().await?;
        Ok(Self { at: Instant::now(), metrics, own: cpu_of("self")?, mesh: site.cpu()? })
    }

    /// When the warm-up ends, and when the load does.
    async fn after_warm_up(site: Arc<Site>, load: Load, ended: Arc<tokio::sync::Notify>) -> Result<(Self, Self)> {
        if !matches!(load.pace, Pace::AtOnce(_)) {
            tokio::time::sleep(load.warm_up).await;
        }
        let from = Self::take(&site).await?;
        ended.notified().await;
        Ok((from, Self::take(&site).await?))
    }
}

/// What a visitor comes for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// To order.
    Place,
    /// To order, wait until it is locked, and pay.
    Pay,
    /// To order what is sold out.
    BeRefused,
    /// To look.
    Browse,
}

/// Visitors of a mesh, each with a name of its own.
#[derive(Debug)]
pub struct Crowd {
    site: Arc<Site>,
    sales: Vec<String>,
    what: Deed,
}

impl Crowd {
    /// In front of sales that are open now, each with so many units and such a payment window; sold out where that is what
    /// they come for.
    pub async fn gather(
        site: Site,
        sales: &[String],
        (stock, window): (u64, Duration),
        what: Deed,
    ) -> Result<Arc<Self>> {
        for sale in sales {
            site.sale(sale, stock, window).await?;
        }
        let site = Arc::new(site);
        if what == Deed::BeRefused {
            sell_out(&site, &sales[0]).await?;
        }
        Ok(Arc::new(Self { site, sales: sales.to_vec(), what }))
    }

    /// Where they are.
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// The mesh, when they have gone.
    pub fn leave(crowd: Arc<Self>) -> Result<Site> {
        let crowd = Arc::into_inner(crowd).context("somebody is still there")?;
        Arc::into_inner(crowd.site).context("the site is still in use")
    }
}

impl Visit for Crowd {
    async fn visit(&self, connection: &mut Connection, n: u64) -> io::Result<Outcome> {
        let sale = &self.sales[(n % self.sales.len() as u64) as usize];
        if let Deed::Browse = self.what {
            // A visitor looks at the list, and four at the sale.
            let path = if n.is_multiple_of(5) { "/v1/sales".to_owned() } else { format!("/v1/sales/{sale}") };
            let answer = connection.call(&Request { method: "GET", path: &path, ..Default::default() }).await?;
            return Ok(if answer.status == 200 { Outcome::Good } else { Outcome::Refused(answer.reason()) });
        }
        let token = self.site.buyer(n)?;
        let key = Uuid::now_v7().to_string();
        let body = format!(r#"{{"sale":"{sale}","quantity":1}}"#);
        let place = Request { method: "POST", path: "/v1/orders", authorization: &token, key: &key, body: &body };
        let answer = connection.call(&place).await?;
        let is_accepted = matches!(answer.status, 200 | 202);
        match self.what {
            Deed::BeRefused => match answer.reason() {
                reason if reason == "SOLD_OUT" => Ok(Outcome::Good),
                reason => Err(io::Error::other(format!("{reason} instead of SOLD_OUT"))),
            },
            _ if !is_accepted => refused(answer.status, answer.reason()),
            Deed::Pay => {
                let order = answer.text("name").unwrap_or_default().to_owned();
                // As the shop's page does it: the buyer is shown the till when a unit is set aside.
                let path = format!("/v1/{order}?wait=2s");
                let wait = Request { method: "GET", path: &path, authorization: &token, ..Default::default() };
                let answer = connection.call(&wait).await?;
                if answer.status != 200 {
                    return refused(answer.status, answer.reason());
                }
                let path = format!("/v1/{order}:pay");
                let key = Uuid::new_v4().to_string();
                let body = r#"{"paymentMethod":"sim_approve"}"#;
                let pay = Request { method: "POST", path: &path, authorization: &token, key: &key, body };
                let answer = connection.call(&pay).await?;
                match answer.status {
                    200 => Ok(Outcome::Good),
                    status => refused(status, answer.reason()),
                }
            }
            Deed::Place | Deed::Browse => Ok(Outcome::Good),
        }
    }
}

/// What the API documents for a crowd; anything else is a failure.
fn refused(status: u16, reason: String) -> io::Result<Outcome> {
    match (status, reason.as_str()) {
        (429 | 503 | 504, _) | (400, "SOLD_OUT") => Ok(Outcome::Refused(reason)),
        _ => Err(io::Error::other(format!("{status} {reason}"))),
    }
}

/// The last unit is bought, so that the sale is over for good.
async fn sell_out(site: &Arc<Site>, sale: &str) -> Result<()> {
    let buyers = Crowd { site: site.clone(), sales: vec![sale.to_owned()], what: Deed::Pay };
    let mut connection = Connection::new(site.address);
    ensure!(buyers.visit(&mut connection, u64::MAX).await? == Outcome::Good, "the last unit was not bought");
    let begun = Instant::now();
    let refused = Crowd { what: Deed::BeRefused, ..buyers };
    while refused.visit(&mut connection, u64::MAX - 1).await.is_err() {
        ensure!(begun.elapsed() < DRAIN_LIMIT, "{sale} is not sold out");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn held_after(site: Arc<Site>, sale: String, units: u64) -> Result<Duration> {
    let begun = Instant::now();
    loop {
        let stock = site.stock(&sale).await;
        if stock.is_ok_and(|stock| stock.held + stock.sold == units as i64) {
            return Ok(begun.elapsed());
        }
        ensure!(begun.elapsed() < DRAIN_LIMIT, "not all units of {sale} are held");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until every order that was accepted is written, locked or not.
pub async fn drain(site: &Site) -> Result<()> {
    let begun = Instant::now();
    loop {
        let metrics = site.metrics().await?;
        if metrics.total(WRITTEN) >= metrics.total(ACCEPTED) {
            return Ok(());
        }
        ensure!(begun.elapsed() < DRAIN_LIMIT, "orders are still being locked after {DRAIN_LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Refusals a second over public gRPC, on four connections. The sale is sold out.
pub async fn soldout_grpc(site: Site, length: Duration) -> Result<(f64, bool)> {
    let site = Arc::new(site);
    site.sale("sale-0", 1, LONG_WINDOW).await?;
    sell_out(&site, "sale-0").await?;
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", site.address))?;
    let channels: Vec<_> = (0..4).map(|_| endpoint.connect_lazy()).collect();
    let buyers = site.clone();
    let rate = saturate(length, move |n| {
        let mut client = OrdersClient::new(channels[n % 4].clone());
        let token = buyers.buyer(n as u64);
        async move {
            let request_id = Uuid::now_v7().to_string();
            let mut request = tonic::Request::new(PlaceOrderRequest { sale: "sale-0".into(), quantity: 1, request_id });
            request.metadata_mut().insert("authorization", token?.parse()?);
            match client.place_order(request).await {
                Err(status) if status.code() == tonic::Code::FailedPrecondition => Ok(()),
                other => Err(anyhow::anyhow!("{other:?} instead of SOLD_OUT")),
            }
        }
    })
    .await?;
    let site = Arc::into_inner(site).context("the site is still in use")?;
    let (audited, _) = tokio::task::spawn_blocking(move || site.stop_and_audit()).await??;
    Ok((rate, audited))
}
