//! What must be true when all is calm: the audit's invariants, and that everything came to its end.

use std::{
    collections::BTreeMap,
    sync::{PoisonError, atomic::Ordering},
};

use mesh::{clock::Clock, testing::at_once};
use proto::{FIRST_EPOCH, Reason, SaleId, v1::OrderState};
use sea_orm::{ConnectionTrait, Statement};
use seckill::audit::Audit;
use stock_svc::{
    domain::permits::Phase,
    permits::Permits,
    store::{Store, sql::SqlStore},
};

use crate::{
    people::{SALE, Told},
    world::World,
};

/// Everything that is not as it must be; nothing when all is well and at rest.
pub fn check(world: &World, told: &Told) -> Vec<String> {
    let now = world.clock.now_ms();
    at_once(async {
        let mut broken = Vec::new();
        let audit = Audit {
            stock: world.data.stock.clone(),
            order: world.data.order.clone(),
            payment: world.data.payment.clone(),
            coordinator: world.data.coordinator.clone(),
            bus: Some(world.bus.clone()),
            permits: Some(world.kv.now()),
            clock: Clock::manual(now).0,
        };
        match audit.look(true).await {
            Ok(report) => broken.extend(report.violations().map(|(invariant, row)| format!("{invariant}: {row}"))),
            Err(error) => broken.push(format!("the audit failed: {error:#}")),
        }
        match states(world).await {
            Ok(states) => {
                memories(told, &states, &mut broken);
                money(world, &states, &mut broken);
            }
            Err(error) => broken.push(format!("orders cannot be read: {error}")),
        }
        if let Err(error) = lapses(world, told, &mut broken).await {
            broken.push(format!("lapsed orders cannot be read: {error}"));
        }
        if let Err(error) = stock(world, told, now, &mut broken).await {
            broken.push(format!("the stock cannot be read: {error}"));
        }
        broken
    })
}

/// I2 at this moment (E10).
pub fn sample(world: &World) -> Option<String> {
    let sale = SaleId::parse("sale", SALE).ok()?;
    let record = at_once(async {
        let found = SqlStore::new(world.data.stock.clone()).sales(std::slice::from_ref(&sale)).await;
        found.ok()?.pop()
    })?;
    let header = at_once(world.kv.now().header(&sale)).ok()??;
    let comparable = header.phase == Phase::Open && header.epoch == record.ledger.epoch;
    (comparable && header.offered() > record.ledger.offerable())
        .then(|| format!("I2: more is offered than there is: {header:?} {:?}", record.ledger))
}

async fn states(world: &World) -> Result<BTreeMap<String, OrderState>, sea_orm::DbErr> {
    let db = &world.data.order;
    let every = Statement::from_string(db.get_database_backend(), "SELECT order_id, state FROM order_record");
    let rows = db.query_all_raw(every).await?;
    rows.iter()
        .map(|row| {
            let state = OrderState::try_from(row.try_get::<i32>("", "state")?).unwrap_or_default();
            Ok((row.try_get("", "order_id")?, state))
        })
        .collect()
}

/// I5, and that nobody was told what was not so: an accepted order is there in the end, and one that was paid stays so.
/// E2: every order is one request's.
fn memories(told: &Told, states: &BTreeMap<String, OrderState>, broken: &mut Vec<String>) {
    use OrderState::{Cancelled, Expired, Paid, Refunded, Rejected};
    let asked = told.asked.lock().unwrap_or_else(PoisonError::into_inner);
    for order in states.keys().filter(|order| !asked.contains(*order)) {
        broken.push(format!("E2: order {order} is of no request"));
    }
    for (order, then) in told.orders.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let Some(now) = states.get(order) else {
            broken.push(format!("I5: order {order} was accepted and is lost"));
            continue;
        };
        // Late money may still turn an end into another one (E24).
        let fits = match then {
            Paid | Refunded | Rejected => now == then,
            Expired | Cancelled => matches!(now, Expired | Cancelled | Refunded | Paid),
            _ => true,
        };
        if !fits {
            let (then, now) = (then.as_str_name(), now.as_str_name());
            broken.push(format!("order {order} was said to be {then}, and is {now}"));
        }
    }
}

/// E11: while no permits were lost, the sweep takes none of an order that was called placed.
async fn lapses(world: &World, told: &Told, broken: &mut Vec<String>) -> anyhow::Result<()> {
    let sale = SaleId::parse("sale", SALE)?;
    let records = SqlStore::new(world.data.stock.clone()).sales(std::slice::from_ref(&sale)).await?;
    if records.iter().any(|record| record.ledger.epoch > FIRST_EPOCH) {
        return Ok(());
    }
    let db = &world.data.order;
    let lapsed = i32::from(Reason::PermitLapsed);
    let sql = format!("SELECT order_id FROM order_record WHERE reject_reason = {lapsed}");
    let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await?;
    let placed = told.placed.lock().unwrap_or_else(PoisonError::into_inner);
    for row in rows {
        let order: String = row.try_get("", "order_id")?;
        if placed.contains(&order) {
            broken.push(format!("E11: order {order} was placed, and its permit lapsed"));
        }
    }
    Ok(())
}

/// I4 by the bank's own books.
fn money(world: &World, states: &BTreeMap<String, OrderState>, broken: &mut Vec<String>) {
    let taken = world.bank.taken();
    for (order, (kept, returned)) in &taken {
        let paid = states.get(order) == Some(&OrderState::Paid);
        if kept + returned > 1 {
            broken.push(format!("I4: order {order} was captured {} times", kept + returned));
        }
        if *kept != u32::from(paid) {
            let state = states.get(order).map(OrderState::as_str_name);
            broken.push(format!("I4: the bank kept {kept} payments of order {order}, which is {state:?}"));
        }
    }
    for (order, state) in states {
        if *state == OrderState::Paid && !taken.contains_key(order) {
            broken.push(format!("I4: order {order} is PAID, and the bank knows nothing of it"));
        }
    }
}

/// R = A, and that "sold out" was final (I8).
async fn stock(world: &World, told: &Told, now: i64, broken: &mut Vec<String>) -> proto::error::Result<()> {
    let sale = SaleId::parse("sale", SALE)?;
    let records = SqlStore::new(world.data.stock.clone()).sales(std::slice::from_ref(&sale)).await?;
    let Some(record) = records.first() else {
        broken.push("there is no sale".to_owned());
        return Ok(());
    };
    let ledger = &record.ledger;
    let header = world.kv.now().header(&sale).await?;
    match header {
        _ if !record.sale.is_live(now) => {}
        Some(header) if header.phase == Phase::Open && header.epoch == ledger.epoch => {
            if header.free != ledger.available {
                broken.push(format!("I2: R = {} and A = {} at rest", header.free, ledger.available));
            }
        }
        header => broken.push(format!("the permits are not open: {header:?}, the fence is at {}", ledger.epoch)),
    }
    let sold_out = *told.sold_out.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(fewest) = sold_out
        && !told.raised.load(Ordering::Relaxed)
        && ledger.total - ledger.sold >= fewest
    {
        let (sold, total) = (ledger.sold, ledger.total);
        broken.push(format!("I8: {fewest} were said to be SOLD_OUT, and {sold} of {total} are sold"));
    }
    Ok(())
}
