//! `seckill audit`: checks I1 to I7 from the databases, the permits and the streams. Reads only.
//!
//! The databases are not read at one instant, so on a live system an order can be caught between two of them. What
//! looks broken is therefore looked at again a moment later, and only what is broken both times is reported. At rest
//! (`--at-rest`) nothing may be under way, and more is demanded: every order terminal, every permit back.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
    time::Duration,
};

use anyhow::Context;
use mesh::{bus::SharedBus, clock::Clock, lifecycle::Lifecycle};
use migrations::Service;
use proto::{SaleId, internal::PaymentState, subjects, v1::OrderState};
use sea_orm::{ConnectionTrait, DatabaseConnection, QueryResult, Statement};
use stock_svc::{
    domain::permits::Phase,
    permits::SharedPermits,
    store::{Store, sql::SqlStore},
};

use crate::{
    assembly::Mesh,
    backends::{Backends, open_existing_database},
    config::StorageArgs,
};

/// How long an order may outlive its deadline while all is healthy (I6).
const DEADLINE_BOUND: Duration = Duration::from_secs(1);
/// Between two looks at what seemed broken: longer than any order is between two databases.
const SECOND_LOOK: Duration = Duration::from_millis(1500);
/// Rows read at once.
const PAGE: usize = 10_000;

/// Where the audit reads.
#[derive(Clone, Debug)]
pub struct Source {
    storage: StorageArgs,
    /// Of a mesh in this process: its embedded bus and permits live nowhere else.
    live: Option<(SharedBus, Option<SharedPermits>)>,
}

impl Source {
    /// The backends named; for a mesh in this process, its own bus and permits.
    pub fn new(storage: &StorageArgs, mesh: Option<&Mesh>) -> anyhow::Result<Self> {
        let live = mesh.map(|mesh| (mesh.backends.bus.clone(), mesh.permits.clone()));
        Ok(Self { storage: storage.clone(), live })
    }
}

/// What the audit found.
#[derive(Debug, Default)]
pub struct Report {
    /// Each broken invariant and the row that breaks it.
    violations: BTreeSet<(&'static str, String)>,
    sales: usize,
    orders: usize,
    holds: usize,
    sagas: usize,
    charges: usize,
    /// What could not be looked at, and why.
    not_checked: Vec<&'static str>,
}

impl Report {
    /// Whether nothing is broken.
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// Each broken invariant and the row that breaks it.
    pub fn violations(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.violations.iter().map(|(invariant, row)| (*invariant, row.as_str()))
    }

    fn broken(&mut self, invariant: &'static str, row: String) {
        self.violations.insert((invariant, row));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sales, orders, holds, sagas, charges, .. } = self;
        writeln!(f, "audit      {sales} sales, {orders} orders, {holds} holds, {sagas} sagas, {charges} charges")?;
        for reason in &self.not_checked {
            writeln!(f, "           not checked: {reason}")?;
        }
        for (invariant, row) in self.violations.iter().take(50) {
            writeln!(f, "broken {invariant}  {row}")?;
        }
        if self.violations.len() > 50 {
            writeln!(f, "… and {} more", self.violations.len() - 50)?;
        }
        match self.violations.len() {
            0 => write!(f, "verdict    clean"),
            count => write!(f, "verdict    BROKEN in {count} places"),
        }
    }
}

/// Looks, and looks again at what seemed broken.
pub async fn run(source: &Source, at_rest: bool) -> anyhow::Result<Report> {
    let life = Lifecycle::new();
    let report = async {
        // Boxed: opening goes deep, and futures that contain this one must stay within what the compiler can lay out.
        let audit = Box::pin(Audit::open(source, &life)).await?;
        let mut report = audit.look(at_rest).await?;
        if !report.is_clean() {
            tokio::time::sleep(SECOND_LOOK).await;
            let second = audit.look(at_rest).await?;
            report.violations = report.violations.intersection(&second.violations).cloned().collect();
        }
        anyhow::Ok(report)
    }
    .await;
    life.kill();
    report
}

/// Everything that is read from.
#[derive(Debug)]
pub struct Audit {
    /// stock-svc's database.
    pub stock: DatabaseConnection,
    /// order-svc's.
    pub order: DatabaseConnection,
    /// payment-svc's.
    pub payment: DatabaseConnection,
    /// The coordinator's.
    pub coordinator: DatabaseConnection,
    /// The streams, where they can be seen.
    pub bus: Option<SharedBus>,
    /// The permits, where they can be seen.
    pub permits: Option<SharedPermits>,
    /// Says what is overdue.
    pub clock: Clock,
}

/// Where an order's hold stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Locked,
    Sold,
    /// Released, or a tombstone.
    Over,
}

impl Hold {
    /// As stock_hold.state has it.
    fn read(number: i32) -> Self {
        match number {
            1 => Hold::Locked,
            2 => Hold::Sold,
            _ => Hold::Over,
        }
    }
}

/// One order's record.
struct Record {
    state: OrderState,
}

impl Audit {
    async fn open(source: &Source, life: &Lifecycle) -> anyhow::Result<Self> {
        let storage = &source.storage;
        let (bus, permits) = match &source.live {
            Some((bus, permits)) => (Some(bus.clone()), permits.clone()),
            None => Backends::open_from_outside(storage, life).await?,
        };
        Ok(Self {
            stock: open_existing_database(storage, Service::Stock).await?,
            order: open_existing_database(storage, Service::Order).await?,
            payment: open_existing_database(storage, Service::Payment).await?,
            coordinator: open_existing_database(storage, Service::Coordinator).await?,
            bus,
            permits,
            clock: Clock::system(),
        })
    }

    /// Looks once. On a live system an order may be caught between two databases: [`run`] looks again.
    pub async fn look(&self, at_rest: bool) -> anyhow::Result<Report> {
        let mut report = Report::default();
        let records = self.records(&mut report, at_rest).await?;
        let holds = self.holds(&mut report, at_rest).await?;
        compare(&mut report, &records, &holds);
        self.money(&mut report, &records).await?;
        self.sagas(&mut report, &records, at_rest).await?;
        self.streams(&mut report, at_rest).await?;
        Ok(report)
    }

    /// I5, I6: what the buyers see.
    async fn records(&self, report: &mut Report, at_rest: bool) -> anyhow::Result<HashMap<String, Record>> {
        let now = self.clock.now_ms();
        let bound = DEADLINE_BOUND.as_millis() as i64;
        let mut records = HashMap::new();
        let columns = "order_id, state, expire_at, close_at";
        pages(&self.order, "order_record", "order_id", columns, |row| {
            let id: String = row.try_get("", "order_id")?;
            let state = OrderState::try_from(row.try_get::<i32>("", "state")?).unwrap_or_default();
            let expire_at: i64 = row.try_get("", "expire_at")?;
            let close_at: Option<i64> = row.try_get("", "close_at")?;
            let open = matches!(state, OrderState::AwaitingPayment | OrderState::Paying);
            if state == OrderState::AwaitingPayment && now > expire_at + bound {
                report.broken("I6", format!("order {id} awaits payment {} ms after its deadline", now - expire_at));
            }
            if state == OrderState::Expired && close_at.is_some_and(|at| at < expire_at) {
                report.broken("I6", format!("order {id} expired before its deadline"));
            }
            if at_rest && open {
                report.broken("I5", format!("order {id} is still {}", state.as_str_name()));
            }
            records.insert(id, Record { state });
            Ok(())
        })
        .await
        .context("order records")?;
        report.orders = records.len();
        Ok(records)
    }

    /// I1, I2, I7: the ledger, its holds, its permits.
    async fn holds(&self, report: &mut Report, at_rest: bool) -> anyhow::Result<HashMap<String, Vec<Hold>>> {
        let mut holds: HashMap<String, Vec<Hold>> = HashMap::new();
        let mut held: HashMap<String, i64> = HashMap::new();
        let mut sold: HashMap<String, i64> = HashMap::new();
        let mut of_buyer: HashMap<(String, String), i64> = HashMap::new();
        // The ledger before the holds and again after: a sale that moved meanwhile is compared by neither.
        let before = self.ledgers().await?;
        pages(&self.stock, "stock_hold", "hold_id", "hold_id, order_id, sale_id, buyer, quantity, state", |row| {
            let order: String = row.try_get("", "order_id")?;
            let sale: String = row.try_get("", "sale_id")?;
            let buyer: String = row.try_get("", "buyer")?;
            let quantity: i64 = row.try_get("", "quantity")?;
            let state = Hold::read(row.try_get("", "state")?);
            match state {
                Hold::Locked => *held.entry(sale.clone()).or_default() += quantity,
                Hold::Sold => *sold.entry(sale.clone()).or_default() += quantity,
                Hold::Over => {}
            }
            if state != Hold::Over {
                *of_buyer.entry((sale, buyer)).or_default() += quantity;
            }
            report.holds += 1;
            holds.entry(order).or_default().push(state);
            Ok(())
        })
        .await
        .context("holds")?;
        let after = self.ledgers().await?;
        for (sale, ledger) in &after {
            let Ledger { available, held: h, sold: d, total, .. } = *ledger;
            if available < 0 || h < 0 || d < 0 || available + h + d != total {
                report.broken("I1", format!("sale {sale}: {available} + {h} + {d} is not {total}"));
            }
            let counted = (held.get(sale).copied().unwrap_or(0), sold.get(sale).copied().unwrap_or(0));
            if before.get(sale) == Some(ledger) && counted != (h, d) {
                report.broken("I1", format!("sale {sale}: held {h} and sold {d}, but the holds add up to {counted:?}"));
            }
        }
        for ((sale, buyer), quantity) in &of_buyer {
            let limit = after.get(sale).map_or(0, |ledger| ledger.limit);
            if *quantity > limit {
                report.broken("I7", format!("buyer {buyer} has {quantity} of sale {sale}, the limit is {limit}"));
            }
        }
        report.sales = after.len();
        self.permits(report, &after, at_rest).await?;
        Ok(holds)
    }

    /// I2: the permits beside the ledger. Both sides count what was granted and what was locked of this epoch, so that
    /// they can be compared without looking at every grant.
    async fn permits(
        &self,
        report: &mut Report,
        ledgers: &HashMap<String, Ledger>,
        at_rest: bool,
    ) -> anyhow::Result<()> {
        let Some(permits) = &self.permits else {
            report.not_checked.push("permits, I2 (embedded: they live in the mesh's process)");
            return Ok(());
        };
        let live = match at_rest {
            true => SqlStore::new(self.stock.clone()).live_sales(self.clock.now_ms()).await?,
            false => Vec::new(),
        };
        let live: HashSet<String> = live.iter().map(|record| record.sale.id.to_string()).collect();
        for (sale, ledger) in ledgers {
            let header = permits.header(&SaleId::parse("sale", sale)?).await?;
            let current = header.filter(|header| header.epoch == ledger.epoch && header.phase == Phase::Open);
            // Lost, of another epoch, or being rebuilt: what they offer cannot be locked, or they offer nothing. That is
            // safe, but no state to rest in.
            let Some(header) = current else {
                if live.contains(sale) {
                    report
                        .broken("I2", format!("sale {sale} at rest: its permits are not open, fence {}", ledger.epoch));
                }
                continue;
            };
            let (free, granted, Ledger { available, persisted, .. }) = (header.free, header.granted, ledger);
            let unpersisted = granted - persisted;
            if free + unpersisted > *available {
                let row =
                    format!("sale {sale}: {free} permits and {unpersisted} unpersisted grants, {available} available");
                report.broken("I2", row);
            } else if at_rest && (free != *available || unpersisted != 0) {
                report.broken(
                    "I2",
                    format!("sale {sale} at rest: {free} permits, {unpersisted} unpersisted, {available} available"),
                );
            }
        }
        Ok(())
    }

    async fn ledgers(&self) -> anyhow::Result<HashMap<String, Ledger>> {
        let mut ledgers = HashMap::new();
        let columns = "sale_id, available, held, sold, total, persisted, epoch, per_buyer_limit";
        pages(&self.stock, "stock_sale", "sale_id", columns, |row| {
            ledgers.insert(
                row.try_get("", "sale_id")?,
                Ledger {
                    available: row.try_get("", "available")?,
                    held: row.try_get("", "held")?,
                    sold: row.try_get("", "sold")?,
                    total: row.try_get("", "total")?,
                    persisted: row.try_get("", "persisted")?,
                    epoch: row.try_get("", "epoch")?,
                    limit: row.try_get("", "per_buyer_limit")?,
                },
            );
            Ok(())
        })
        .await
        .context("sales")?;
        Ok(ledgers)
    }

    /// I4: money.
    async fn money(&self, report: &mut Report, records: &HashMap<String, Record>) -> anyhow::Result<()> {
        let mut captured: HashMap<String, (u32, u32)> = HashMap::new();
        pages(&self.payment, "payment_charge", "payment_id", "payment_id, order_id, state", |row| {
            let order: String = row.try_get("", "order_id")?;
            let (kept, returned) = captured.entry(order).or_default();
            match PaymentState::try_from(row.try_get::<i32>("", "state")?).unwrap_or_default() {
                PaymentState::Captured | PaymentState::RefundPending => *kept += 1,
                PaymentState::Refunded => *returned += 1,
                _ => {}
            }
            report.charges += 1;
            Ok(())
        })
        .await
        .context("charges")?;
        for (order, (kept, returned)) in &captured {
            let state = records.get(order).map(|r| r.state);
            let paid = state == Some(OrderState::Paid);
            if *kept + *returned > 1 {
                report.broken("I4", format!("order {order} was captured {} times", kept + returned));
            }
            if (*kept == 1) != paid && (*kept > 0 || paid) {
                report.broken("I4", format!("order {order} is {state:?}, captured and kept {kept} times"));
            }
        }
        for (order, record) in records {
            if record.state == OrderState::Paid && !captured.contains_key(order) {
                report.broken("I4", format!("order {order} is PAID without a charge"));
            }
        }
        Ok(())
    }

    /// I3, I5: the sagas.
    async fn sagas(&self, report: &mut Report, records: &HashMap<String, Record>, at_rest: bool) -> anyhow::Result<()> {
        pages(&self.coordinator, "coordinator_saga", "saga_id", "saga_id, kind, state, stuck", |row| {
            let id: String = row.try_get("", "saga_id")?;
            let kind: String = row.try_get("", "kind")?;
            let state: String = row.try_get("", "state")?;
            let stuck: bool = row.try_get("", "stuck")?;
            report.sagas += 1;
            if stuck {
                report.broken("I5", format!("{kind} {id} is stuck in {state}"));
            }
            if kind == "order_saga" {
                let seen = records.get(&id).map(|r| r.state.as_str_name());
                let terminal = matches!(state.as_str(), "PAID" | "REJECTED" | "EXPIRED" | "CANCELLED" | "REFUNDED");
                if terminal && seen != Some(state.as_str()) {
                    report.broken("I5", format!("the saga of order {id} is {state}, its record {seen:?}"));
                }
                if at_rest && !terminal {
                    report.broken("I5", format!("the saga of order {id} is still {state}"));
                }
            }
            Ok(())
        })
        .await
        .context("sagas")
    }

    /// I5: nothing accepted waits unread, nothing was given up.
    async fn streams(&self, report: &mut Report, at_rest: bool) -> anyhow::Result<()> {
        let Some(bus) = &self.bus else {
            report.not_checked.push("streams (embedded: stop the mesh first, they are its own while it runs)");
            return Ok(());
        };
        if let Some(progress) = bus.progress(subjects::ORDERS, subjects::FUNNEL).await?
            && at_rest
            && progress.waiting + progress.pending > 0
        {
            let mesh::bus::Progress { waiting, pending, .. } = progress;
            report.broken("I5", format!("the funnel has {waiting} accepted orders waiting and {pending} in hand"));
        }
        for letter in bus.dead_letters(None, 100).await? {
            if letter.subject.starts_with("orders.placed.") {
                report
                    .broken("I5", format!("accepted order among the dead letters: {} ({})", letter.id, letter.reason));
            }
        }
        Ok(())
    }
}

/// A sale's ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ledger {
    available: i64,
    held: i64,
    sold: i64,
    total: i64,
    persisted: i64,
    epoch: i64,
    limit: i64,
}

/// I3: orders against holds.
fn compare(report: &mut Report, records: &HashMap<String, Record>, holds: &HashMap<String, Vec<Hold>>) {
    let none = Vec::new();
    for (order, record) in records {
        let holds = holds.get(order).unwrap_or(&none);
        let has = |state| holds.iter().filter(|h| **h == state).count();
        let fits = match record.state {
            OrderState::AwaitingPayment | OrderState::Paying => has(Hold::Locked) == 1 || has(Hold::Sold) == 1,
            OrderState::Paid => has(Hold::Sold) == 1 && has(Hold::Locked) == 0,
            _ => has(Hold::Locked) == 0 && has(Hold::Sold) == 0,
        };
        if !fits {
            report.broken("I3", format!("order {order} is {} with holds {holds:?}", record.state.as_str_name()));
        }
    }
    for (order, holds) in holds {
        let active = holds.iter().any(|h| *h != Hold::Over);
        if active && !records.contains_key(order) {
            report.broken("I3", format!("a unit is held for order {order}, which has no record"));
        }
    }
}

/// Reads a table in pages by its key.
async fn pages(
    db: &DatabaseConnection,
    table: &str,
    key: &str,
    columns: &str,
    mut each: impl FnMut(&QueryResult) -> Result<(), sea_orm::DbErr>,
) -> anyhow::Result<()> {
    let mut after = String::new();
    loop {
        // Keys are ids of ours, read back from the table; quotes are doubled all the same.
        let sql = format!(
            "SELECT {columns} FROM {table} WHERE {key} > '{}' ORDER BY {key} LIMIT {PAGE}",
            after.replace('\'', "''")
        );
        let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await?;
        for row in &rows {
            each(row)?;
        }
        match rows.last() {
            Some(last) if rows.len() == PAGE => after = last.try_get("", key)?,
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn where_no_mesh_was_the_audit_says_so_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("seckill-data");
        let storage = StorageArgs { data_dir: data_dir.clone(), ..Default::default() };
        let error = run(&Source::new(&storage, None).unwrap(), true).await.unwrap_err();
        assert!(error.to_string().contains("no database of stock at"), "{error:#}");
        assert!(!data_dir.exists());
    }

    #[tokio::test]
    async fn a_database_without_this_versions_schema_is_not_audited() {
        let dir = tempfile::tempdir().unwrap();
        let storage = StorageArgs { data_dir: dir.path().to_owned(), ..Default::default() };
        crate::backends::open_database(&storage, Service::Stock).await.unwrap();
        let error = run(&Source::new(&storage, None).unwrap(), true).await.unwrap_err();
        assert!(error.to_string().contains("seckill migrate up"), "{error:#}");
    }
}
