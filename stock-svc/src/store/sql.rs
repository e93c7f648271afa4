//! The store in SQL. A batch is a handful of statements, whatever its size; the sales' rows are locked first and in
//! order of their ids, so that batches wait for each other instead of deadlocking.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use async_trait::async_trait;
use mesh::sql::{self, transaction};
use proto::{BuyerId, Error, Money, OrderId, Reason, RequestId, SaleId, error::Result};
use sea_orm::{
    ActiveValue::{NotSet, Set},
    DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, IntoActiveModel, QueryOrder, QueryResult, QuerySelect,
    prelude::*,
    sea_query::{Alias, CaseStatement, ExprTrait, Func, OnConflict, Query, Value},
};

use super::{Applied, Counted, Fenced, Hook, Operation, Outcome, Outgoing, Record, Standing, Store};
use crate::domain::{
    HoldId,
    ledger::{Book, Changes, Hold, HoldState, Ledger},
    permits::{Grant, Held, Refund, Release, Return},
    sale::{NewSale, Sale, Verb},
};

/// Rows of the snapshot read at once.
const SNAPSHOT_ROWS: u64 = 10_000;

/// Batches of two sales can meet in one hold's key; the loser begins again and sees the winner's row.
const KEY_RACES: u32 = 5;

mod stock_sale {
    //! The table, see the crate `migrations`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "stock_sale")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub sale_id: String,
        pub request_id: String,
        pub payload_hash: String,
        pub title: String,
        #[sea_orm(column_type = "Text")]
        pub description: String,
        pub list_currency: Option<String>,
        pub list_units: Option<i64>,
        pub list_nanos: Option<i32>,
        pub price_currency: String,
        pub price_units: i64,
        pub price_nanos: i32,
        pub per_buyer_limit: i64,
        pub start_at: i64,
        pub end_at: i64,
        pub payment_window: i64,
        pub verb: i32,
        pub version: i64,
        pub create_at: i64,
        pub close_at: i64,
        pub total: i64,
        pub available: i64,
        pub held: i64,
        pub sold: i64,
        pub persisted: i64,
        pub epoch: i64,
        pub next_epoch: i64,
        pub release_seq: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod stock_hold {
    //! The table, see the crate `migrations`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "stock_hold")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub hold_id: String,
        pub order_id: String,
        pub sale_id: String,
        /// Both in one, see the index.
        pub sale_buyer: String,
        pub buyer: String,
        pub quantity: i64,
        pub state: i32,
        pub refusal: i32,
        pub grant_epoch: i64,
        pub release_seq: i64,
        pub expire_at: i64,
        pub create_at: i64,
        pub update_at: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod stock_outbox {
    //! The table, see the crate `migrations`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "stock_outbox")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub id: i64,
        pub sale_id: String,
        pub kind: i32,
        pub hold_id: String,
        pub buyer: String,
        pub quantity: i64,
        pub release_seq: i64,
        pub grant_epoch: i64,
        pub create_at: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod stock_adjustment {
    //! The table, see the crate `migrations`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "stock_adjustment")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: String,
        pub sale_id: String,
        pub delta: i64,
        pub create_at: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod sales;

use sales::Sales;

/// Numbers in `stock_hold.state`.
const LOCKED: i32 = 1;
const SOLD: i32 = 2;
const RELEASED: i32 = 3;
const TOMBSTONE: i32 = 4;

/// Numbers in `stock_outbox.kind`.
const RELEASE: i32 = 1;
const RETURN: i32 = 2;

/// Numbers in `stock_sale.verb`.
const OPEN: i32 = 1;
const PAUSED: i32 = 2;
const CLOSED: i32 = 3;

/// See the module.
#[derive(Clone, Debug)]
pub struct SqlStore {
    db: sql::Database,
    sales: Sales,
}

impl SqlStore {
    /// On a migrated database.
    pub fn new(db: DatabaseConnection) -> Self {
        Self { db: db.into(), sales: Sales::default() }
    }
}

#[async_trait]
impl Store for SqlStore {
    async fn create_sale(&self, new: NewSale, payload_hash: String) -> Result<Record> {
        let record = Record { ledger: Ledger::new(new.stock), sale: new.sale.into() };
        let request = new.request.to_string();
        let row = sale_row(&record, &request, &payload_hash).into_active_model();
        let error = match stock_sale::Entity::insert(row).exec_without_returning(&self.db).await {
            Ok(_) => return Ok(record),
            Err(error) if sql::is_duplicate(&error) => error,
            Err(error) => return Err(sql::fault(error)),
        };
        let by_request = stock_sale::Column::RequestId.eq(&request);
        match stock_sale::Entity::find().filter(by_request).one(&self.db).await.map_err(sql::fault)? {
            Some(row) if row.payload_hash == payload_hash => record_of(row),
            Some(_) => Err(reused()),
            None => Err(Error::invalid("sale_id", "is taken").with_context(error)),
        }
    }

    async fn sales(&self, ids: &[SaleId]) -> Result<Vec<Record>> {
        let mut records = Vec::with_capacity(ids.len());
        for chunk in sql::key_chunks(ids) {
            let wanted = stock_sale::Column::SaleId.is_in(chunk.iter().map(SaleId::as_str));
            records.extend(self.sales.read(&self.db, stock_sale::Entity::find().filter(wanted)).await?);
        }
        Ok(records)
    }

    async fn sales_page(&self, after: Option<&SaleId>, limit: u64) -> Result<Vec<Record>> {
        let mut select = stock_sale::Entity::find().order_by_asc(stock_sale::Column::SaleId).limit(limit);
        if let Some(after) = after {
            select = select.filter(stock_sale::Column::SaleId.gt(after.as_str()));
        }
        select.all(&self.db).await.map_err(sql::fault)?.into_iter().map(record_of).collect()
    }

    async fn live_sales(&self, now: i64) -> Result<Vec<Record>> {
        // Few sales have the longest window that there can be: they are told from the others in memory.
        let since = stock_sale::Column::EndAt.gt(Sale::live_since(now));
        let mut records = self.sales.read(&self.db, stock_sale::Entity::find().filter(since)).await?;
        records.retain(|record| record.sale.is_live(now));
        self.sales.keep_only(&records);
        Ok(records)
    }

    async fn apply_verb(&self, sale: &SaleId, verb: Verb, now: i64) -> Result<Record> {
        let sale = sale.clone();
        let record = transaction(&self.db, |tx| {
            let (sale, sales) = (sale.clone(), self.sales.clone());
            Box::pin(async move {
                let mut record = sales.lock_one(tx, &sale).await?;
                if Arc::make_mut(&mut record.sale).apply(verb, now)? {
                    update_sale(tx, &record).await?;
                }
                Ok(record)
            })
        })
        .await?;
        Ok(record)
    }

    async fn apply(&self, items: Vec<(SaleId, Operation)>, now: i64) -> Result<Applied> {
        let items = Arc::new(items);
        let mut races = 0;
        loop {
            let applied = transaction(&self.db, |tx| {
                let (items, sales) = (items.clone(), self.sales.clone());
                Box::pin(async move { apply(tx, &sales, &items, now).await })
            })
            .await;
            match applied {
                Err(sql::Error::Db(error)) if sql::is_duplicate(&error) && races < KEY_RACES => races += 1,
                applied => return Ok(applied?),
            }
        }
    }

    async fn adjust(&self, sale: &SaleId, request: RequestId, delta: i64, now: i64, before: Hook) -> Result<Record> {
        let sale = sale.clone();
        let record = transaction(&self.db, |tx| {
            let (sale, sales, before) = (sale.clone(), self.sales.clone(), before.clone());
            Box::pin(async move {
                let mut record = sales.lock_one(tx, &sale).await?;
                let done = stock_adjustment::Entity::find_by_id(request.to_string()).one(tx).await?;
                match done {
                    Some(done) if done.sale_id == sale.as_str() && done.delta == delta => return Ok(record),
                    Some(_) => return Err(reused().into()),
                    None => {}
                }
                let mut book = open_book(&record, BTreeMap::new(), BTreeMap::new());
                book.adjust(adjustment_id(&sale, &request)?, delta)?;
                before(standing(tx, record.clone()).await?).await?;
                let (ledger, changes) = book.close();
                record.ledger = ledger;
                Arc::make_mut(&mut record.sale).version += 1;
                let row = stock_adjustment::Model {
                    request_id: request.to_string(),
                    sale_id: sale.to_string(),
                    delta,
                    create_at: now,
                };
                stock_adjustment::Entity::insert(row.into_active_model()).exec_without_returning(tx).await?;
                update_sale(tx, &record).await?;
                write(tx, vec![(sale, changes)], now).await?;
                Ok(record)
            })
        })
        .await;
        match record {
            // The same request for another sale, at the same moment: sales do not share a row lock.
            Err(sql::Error::Db(error)) if sql::is_duplicate(&error) => Err(reused()),
            record => Ok(record?),
        }
    }

    async fn allocate_epoch(&self, sale: &SaleId, above: i64) -> Result<i64> {
        let sale = sale.clone();
        let epoch = transaction(&self.db, |tx| {
            let (sale, sales) = (sale.clone(), self.sales.clone());
            Box::pin(async move {
                let mut record = sales.lock_one(tx, &sale).await?;
                let epoch = record.ledger.allocate_epoch(above);
                update_sale(tx, &record).await?;
                Ok(epoch)
            })
        })
        .await?;
        Ok(epoch)
    }

    async fn fence(&self, sale: &SaleId, epoch: i64) -> Result<Option<Fenced>> {
        let sale = sale.clone();
        let fenced = transaction(&self.db, |tx| {
            let (sale, sales) = (sale.clone(), self.sales.clone());
            Box::pin(async move {
                let mut record = sales.lock_one(tx, &sale).await?;
                let Some(snapshot) = record.ledger.move_fence(epoch) else { return Ok(None) };
                update_sale(tx, &record).await?;
                // Every change of this sale's holds takes the row lock that is held here: what is read is one moment.
                let held = read_held(tx, &record.sale).await?;
                Ok(Some(Fenced { snapshot, facts: record.facts(), held }))
            })
        })
        .await?;
        Ok(fenced)
    }

    async fn known_holds(&self, holds: &[HoldId]) -> Result<BTreeSet<HoldId>> {
        let mut known = BTreeSet::new();
        for chunk in sql::key_chunks(holds) {
            let wanted = stock_hold::Column::HoldId.is_in(chunk.iter().map(HoldId::to_string));
            let ids = stock_hold::Entity::find().filter(wanted).select_only().column(stock_hold::Column::HoldId);
            let ids: Vec<String> = ids.into_tuple().all(&self.db).await.map_err(sql::fault)?;
            for id in ids {
                known.insert(HoldId::parse("hold_id", &id)?);
            }
        }
        Ok(known)
    }

    async fn under_lock(&self, sale: &SaleId, work: Hook) -> Result<()> {
        let sale = sale.clone();
        transaction(&self.db, |tx| {
            let (sale, sales, work) = (sale.clone(), self.sales.clone(), work.clone());
            Box::pin(async move {
                let record = sales.lock_one(tx, &sale).await?;
                Ok(work(standing(tx, record).await?).await?)
            })
        })
        .await?;
        Ok(())
    }

    async fn standing(&self, sale: &SaleId) -> Result<Standing> {
        let found = self.sales.read(&self.db, stock_sale::Entity::find_by_id(sale.as_str())).await?.pop();
        let record = found.ok_or_else(|| Error::not_found("sale"))?;
        // The outbox afterwards: when it is empty, every release in the ledger read above has been relayed.
        let outbox_is_empty = outbox_is_empty(&self.db, sale).await.map_err(sql::fault)?;
        Ok(Standing { record, outbox_is_empty })
    }

    async fn count_holds(&self, sale: &SaleId) -> Result<Counted> {
        use stock_hold::{Column as Hold, Entity as Holds};
        use stock_sale::{Column as Sale, Entity as Sales};
        let integer = if self.db.get_database_backend() == DbBackend::MySql { "SIGNED" } else { "BIGINT" };
        let of_the_sale = Expr::col((Holds, Hold::SaleId)).equals((Sales, Sale::SaleId));
        let counts = Expr::col((Holds, Hold::State)).is_in([LOCKED, SOLD]);
        // One statement sees one moment, on all three.
        let select = Query::select()
            .column((Sales, Sale::Held))
            .column((Sales, Sale::Sold))
            .column((Holds, Hold::State))
            .expr_as(Expr::col((Holds, Hold::Quantity)).sum().cast_as(Alias::new(integer)), Alias::new("units"))
            .from(Sales)
            .left_join(Holds, of_the_sale.and(counts))
            .and_where(Expr::col((Sales, Sale::SaleId)).eq(sale.as_str()))
            .group_by_columns([(Sales, Sale::Held), (Sales, Sale::Sold)])
            .group_by_col((Holds, Hold::State))
            .to_owned();
        let rows = self.db.query_all(&select).await.map_err(sql::fault)?;
        if rows.is_empty() {
            return Err(Error::not_found("sale"));
        }
        let mut counted = Counted::default();
        let mut read = |row: &QueryResult| -> Result<(), DbErr> {
            counted.held = row.try_get("", "held")?;
            counted.sold = row.try_get("", "sold")?;
            let units: Option<i64> = row.try_get("", "units")?;
            match row.try_get::<Option<i32>>("", "state")? {
                Some(LOCKED) => counted.locked_in_holds = units.unwrap_or_default(),
                Some(SOLD) => counted.sold_in_holds = units.unwrap_or_default(),
                _ => {}
            }
            Ok(())
        };
        rows.iter().try_for_each(&mut read).map_err(sql::fault)?;
        Ok(counted)
    }

    async fn outbox(&self, after: i64, without: &[SaleId], limit: u64) -> Result<Vec<Outgoing>> {
        let mut select = stock_outbox::Entity::find()
            .filter(stock_outbox::Column::Id.gt(after))
            .order_by_asc(stock_outbox::Column::Id)
            .limit(limit);
        if !without.is_empty() {
            select = select.filter(stock_outbox::Column::SaleId.is_not_in(without.iter().map(SaleId::as_str)));
        }
        select.all(&self.db).await.map_err(sql::fault)?.into_iter().map(outgoing_of).collect()
    }

    async fn forget_outgoing(&self, ids: &[i64]) -> Result<()> {
        for chunk in sql::key_chunks(ids) {
            let relayed = stock_outbox::Column::Id.is_in(chunk.iter().copied());
            stock_outbox::Entity::delete_many().filter(relayed).exec(&self.db).await.map_err(sql::fault)?;
        }
        Ok(())
    }
}

/// One batch: lock, read, decide, write.
async fn apply(
    tx: &DatabaseTransaction,
    sales: &Sales,
    items: &[(SaleId, Operation)],
    now: i64,
) -> Result<Applied, sql::Error> {
    let mut records = sales.lock(tx, &items.iter().map(|(sale, _)| sale).collect()).await?;
    let holds = read_holds(tx, items.iter().map(|(_, operation)| operation.hold())).await?;
    let (mut there, mut buyers) = (BTreeMap::<_, BTreeMap<_, _>>::new(), BTreeSet::new());
    for (sale, operation) in items.iter().filter(|(sale, _)| records.contains_key(sale)) {
        let hold = operation.hold();
        if let Some(row) = holds.get(&hold) {
            there.entry(sale).or_default().insert(hold, row.clone());
        }
        if let Operation::Lock(lock) = operation {
            buyers.insert((sale, &lock.buyer));
        }
    }
    let mut bought = read_bought(tx, &buyers).await?;
    let mut books: BTreeMap<SaleId, Book> = BTreeMap::new();
    for (id, record) in &records {
        let (there, bought) = (there.remove(id).unwrap_or_default(), bought.remove(id).unwrap_or_default());
        books.insert(id.clone(), open_book(record, there, bought));
    }
    let shared = shared_holds(items);
    let mut applied = Applied::default();
    for (sale, operation) in items {
        let result = match (books.get_mut(sale), operation) {
            (None, _) => Err(Error::not_found("sale")),
            (Some(book), Operation::Lock(lock)) => Ok(Outcome::Locked(book.lock(lock))),
            (Some(book), Operation::Release { hold, order, buyer }) => {
                book.release(*hold, *order, buyer).map(|()| Outcome::Done)
            }
            (Some(book), Operation::Deduct { hold }) => book.deduct(*hold).map(|()| Outcome::Done),
            (Some(book), Operation::Sweep(pending)) => Ok(Outcome::Swept(book.sweep(pending))),
        };
        applied.results.push(result);
        share(&mut books, &shared, sale, operation.hold());
    }
    let mut all_changes = Vec::with_capacity(books.len());
    let mut moved = BTreeSet::new();
    for (id, book) in books {
        let (ledger, changes) = book.close();
        if let Some(record) = records.get_mut(&id)
            && record.ledger != ledger
        {
            record.ledger = ledger;
            moved.insert(id.clone());
        }
        applied.has_refunds |= !changes.outbox.is_empty();
        all_changes.push((id, changes));
    }
    update_sales(tx, &moved.iter().map(|id| &records[id]).collect::<Vec<_>>(), &COUNTERS).await?;
    write(tx, all_changes, now).await?;
    applied.records = records;
    Ok(applied)
}

/// Holds that a batch wants in more than one sale: a buyer may use one request id for several.
fn shared_holds(items: &[(SaleId, Operation)]) -> BTreeMap<HoldId, BTreeSet<&SaleId>> {
    let mut sales_of = BTreeMap::<_, BTreeSet<_>>::new();
    for (sale, operation) in items {
        sales_of.entry(operation.hold()).or_default().insert(sale);
    }
    sales_of.retain(|_, sales| sales.len() > 1);
    sales_of
}

/// Tells the other sales' books of such a hold, now that one has made it.
fn share(
    books: &mut BTreeMap<SaleId, Book>,
    shared: &BTreeMap<HoldId, BTreeSet<&SaleId>>,
    made_in: &SaleId,
    id: HoldId,
) {
    let Some(sales) = shared.get(&id) else { return };
    let Some(hold) = books.get(made_in).and_then(|book| book.hold(id)).cloned() else { return };
    for sale in sales.iter().filter(|sale| **sale != made_in) {
        if let Some(book) = books.get_mut(*sale) {
            book.learn(id, &hold);
        }
    }
}

impl Operation {
    fn hold(&self) -> HoldId {
        match self {
            Operation::Lock(lock) => lock.hold,
            Operation::Release { hold, .. } | Operation::Deduct { hold } => *hold,
            Operation::Sweep(pending) => pending.hold,
        }
    }
}

fn open_book(record: &Record, holds: BTreeMap<HoldId, Hold>, bought: BTreeMap<BuyerId, i64>) -> Book {
    Book::open(record.sale.id.clone(), record.sale.limit, record.ledger.clone(), holds, bought)
}

async fn read_holds(
    tx: &DatabaseTransaction,
    ids: impl Iterator<Item = HoldId>,
) -> Result<BTreeMap<HoldId, Hold>, sql::Error> {
    let ids: BTreeSet<String> = ids.map(|id| id.to_string()).collect();
    let ids: Vec<String> = ids.into_iter().collect();
    let mut holds = BTreeMap::new();
    for chunk in sql::key_chunks(&ids) {
        let wanted = stock_hold::Column::HoldId.is_in(chunk.iter().map(String::as_str));
        for row in stock_hold::Entity::find().filter(wanted).all(tx).await? {
            let id = read_id(&row.hold_id)?;
            holds.insert(id, hold_of(row)?);
        }
    }
    Ok(holds)
}

/// What these buyers hold or own of these sales.
async fn read_bought(
    tx: &DatabaseTransaction,
    buyers: &BTreeSet<(&SaleId, &BuyerId)>,
) -> Result<BTreeMap<SaleId, BTreeMap<BuyerId, i64>>, sql::Error> {
    use stock_hold::Column;
    // A sum is a decimal on two of the three, and only MySQL calls the integer otherwise.
    let integer = if tx.get_database_backend() == DbBackend::MySql { "SIGNED" } else { "BIGINT" };
    let of_key: BTreeMap<String, _> =
        buyers.iter().map(|(sale, buyer)| (sale_buyer(sale, buyer.as_str()), (*sale, *buyer))).collect();
    let keys: Vec<&str> = of_key.keys().map(String::as_str).collect();
    let mut bought = BTreeMap::<SaleId, BTreeMap<BuyerId, i64>>::new();
    for chunk in sql::key_chunks(&keys) {
        let rows: Vec<(String, i64)> = stock_hold::Entity::find()
            .select_only()
            .column(Column::SaleBuyer)
            .column_as(Column::Quantity.sum().cast_as(Alias::new(integer)), "units")
            .filter(Column::SaleBuyer.is_in(chunk))
            .filter(Column::State.is_in([LOCKED, SOLD]))
            // By this column and no other: for a group of `sale_id`, PostgreSQL that has not analysed the table walks
            // that column's index, which compares every hold of the sale with every key. That is a second a batch.
            .group_by(Column::SaleBuyer)
            // MySQL takes "a" and "a " for the same text, and they are two buyers.
            .group_by(Func::char_length(Expr::col(Column::SaleBuyer)))
            .into_tuple()
            .all(tx)
            .await?;
        for (key, units) in rows {
            // For the same reason MySQL may find somebody who was not asked for.
            let Some((sale, buyer)) = of_key.get(&key) else { continue };
            bought.entry((*sale).clone()).or_default().insert((*buyer).clone(), units);
        }
    }
    Ok(bought)
}

/// Every hold that is locked or sold, oldest first.
async fn read_held(tx: &DatabaseTransaction, sale: &Sale) -> Result<Vec<Held>, sql::Error> {
    use stock_hold::Column;
    let mut held = Vec::new();
    let mut after = String::new();
    loop {
        let rows = stock_hold::Entity::find()
            .filter(Column::SaleId.eq(sale.id.as_str()))
            .filter(Column::State.is_in([LOCKED, SOLD]))
            .filter(Column::HoldId.gt(after.as_str()))
            .order_by_asc(Column::HoldId)
            .limit(SNAPSHOT_ROWS)
            .all(tx)
            .await?;
        let Some(last) = rows.last() else { break };
        after.clone_from(&last.hold_id);
        for row in rows {
            // The order was created when its grant was taken, and falls due a payment window later.
            let at = Ord::max(row.expire_at - sale.payment_window, 0);
            let buyer = BuyerId::parse(&row.buyer)?;
            let grant = Grant { epoch: row.grant_epoch, quantity: row.quantity, at, buyer };
            held.push(Held { hold: read_id(&row.hold_id)?, grant });
        }
    }
    held.sort_by_key(|held| held.grant.at);
    Ok(held)
}

async fn outbox_is_empty(db: &impl ConnectionTrait, sale: &SaleId) -> Result<bool, DbErr> {
    let waiting = stock_outbox::Column::SaleId.eq(sale.as_str());
    Ok(stock_outbox::Entity::find().filter(waiting).limit(1).one(db).await?.is_none())
}

async fn standing(tx: &DatabaseTransaction, record: Record) -> Result<Standing, sql::Error> {
    let outbox_is_empty = outbox_is_empty(tx, &record.sale.id).await?;
    Ok(Standing { record, outbox_is_empty })
}

/// Sales that one statement changes. Its cost grows with the square, one for each is a round trip for each, and an upsert
/// would have to name every column that a sale must have.
const SALES_AT_ONCE: usize = 32;

/// A column, and what a sale has in it.
type Field = (stock_sale::Column, fn(&Record) -> Value);

/// What the operations of a batch change of a sale.
const COUNTERS: [Field; 5] = [
    (stock_sale::Column::Available, |r| r.ledger.available.into()),
    (stock_sale::Column::Held, |r| r.ledger.held.into()),
    (stock_sale::Column::Sold, |r| r.ledger.sold.into()),
    (stock_sale::Column::Persisted, |r| r.ledger.persisted.into()),
    (stock_sale::Column::ReleaseSeq, |r| r.ledger.release_seq.into()),
];

/// What only operators and rebuilds change. Together with [`COUNTERS`] everything that can change.
const TERMS: [Field; 6] = [
    (stock_sale::Column::Verb, |r| verb_number(r.sale.verb).into()),
    (stock_sale::Column::Version, |r| r.sale.version.into()),
    (stock_sale::Column::CloseAt, |r| r.sale.close_at.into()),
    (stock_sale::Column::Total, |r| r.ledger.total.into()),
    (stock_sale::Column::Epoch, |r| r.ledger.epoch.into()),
    (stock_sale::Column::NextEpoch, |r| r.ledger.next_epoch.into()),
];

/// Writes everything that can change of a sale.
async fn update_sale(tx: &DatabaseTransaction, record: &Record) -> Result<(), sql::Error> {
    // A further field that changes belongs into one of the two lists, or it would change in memory alone. Of the sale
    // itself these are the verb, the version and when it was closed.
    let Ledger { total: _, available: _, held: _, sold: _, persisted: _, epoch: _, next_epoch: _, release_seq: _ } =
        record.ledger;
    update_sales(tx, &[record], &[&COUNTERS[..], &TERMS[..]].concat()).await
}

/// Writes these fields of these sales, whose rows are locked.
async fn update_sales(tx: &DatabaseTransaction, records: &[&Record], fields: &[Field]) -> Result<(), sql::Error> {
    for chunk in records.chunks(SALES_AT_ONCE).flat_map(sql::key_chunks) {
        let is = |record: &Record| stock_sale::Column::SaleId.eq(record.sale.id.as_str());
        let these = stock_sale::Column::SaleId.is_in(chunk.iter().map(|record| record.sale.id.as_str()));
        let mut update = stock_sale::Entity::update_many().filter(these);
        for (column, value) in fields {
            let whose = chunk.iter().fold(CaseStatement::new(), |case, record| case.case(is(record), value(record)));
            update = update.col_expr(*column, whose.into());
        }
        update.exec(tx).await?;
    }
    Ok(())
}

async fn write(tx: &DatabaseTransaction, all: Vec<(SaleId, Changes)>, now: i64) -> Result<(), sql::Error> {
    let (mut inserted, mut moved, mut outgoing) = (Vec::new(), Vec::new(), Vec::new());
    for (sale, changes) in all {
        inserted.extend(changes.inserted.iter().map(|(id, hold)| hold_row(*id, hold, now).into_active_model()));
        moved.extend(changes.moved.iter().map(|(id, hold)| hold_row(*id, hold, now).into_active_model()));
        outgoing.extend(changes.outbox.iter().map(|refund| outgoing_row(&sale, refund, now)));
    }
    for chunk in sql::chunks(&inserted) {
        stock_hold::Entity::insert_many(chunk.to_vec()).exec_without_returning(tx).await?;
    }
    for chunk in sql::chunks(&moved) {
        use stock_hold::Column;
        // These rows are there, and nobody else can change them: the insert only carries the new values of all of
        // them in one statement.
        let update = OnConflict::column(Column::HoldId)
            .update_columns([Column::State, Column::ReleaseSeq, Column::UpdateAt])
            .to_owned();
        stock_hold::Entity::insert_many(chunk.to_vec()).on_conflict(update).exec_without_returning(tx).await?;
    }
    for chunk in sql::chunks(&outgoing) {
        stock_outbox::Entity::insert_many(chunk.to_vec()).exec_without_returning(tx).await?;
    }
    Ok(())
}

fn reused() -> Error {
    Error::new(Reason::RequestIdReused, "the request id was used with another payload")
}

/// An adjustment's id among the releases: apart from every hold's, and the same for every retry.
fn adjustment_id(sale: &SaleId, request: &RequestId) -> Result<HoldId> {
    let operator = BuyerId::parse(sale.as_str())?;
    Ok(OrderId::derive(&operator, request).derive_for("adjustment", sale.as_str().as_bytes()))
}

fn broken(what: &str) -> Error {
    Error::internal(format!("a broken row: {what}"))
}

fn read_id(text: &str) -> Result<HoldId> {
    text.parse().map_err(|_| broken("id"))
}

fn verb_number(verb: Verb) -> i32 {
    match verb {
        Verb::Open => OPEN,
        Verb::Paused => PAUSED,
        Verb::Closed => CLOSED,
    }
}

fn sale_row(record: &Record, request: &str, payload_hash: &str) -> stock_sale::Model {
    let Record { sale, ledger } = record;
    stock_sale::Model {
        sale_id: sale.id.to_string(),
        request_id: request.to_owned(),
        payload_hash: payload_hash.to_owned(),
        title: sale.title.clone(),
        description: sale.description.clone(),
        list_currency: sale.list_price.as_ref().map(|p| p.currency().to_owned()),
        list_units: sale.list_price.as_ref().map(Money::units),
        list_nanos: sale.list_price.as_ref().map(Money::nanos),
        price_currency: sale.price.currency().to_owned(),
        price_units: sale.price.units(),
        price_nanos: sale.price.nanos(),
        per_buyer_limit: sale.limit,
        start_at: sale.start_at,
        end_at: sale.end_at,
        payment_window: sale.payment_window,
        verb: verb_number(sale.verb),
        version: sale.version,
        create_at: sale.create_at,
        close_at: sale.close_at,
        total: ledger.total,
        available: ledger.available,
        held: ledger.held,
        sold: ledger.sold,
        persisted: ledger.persisted,
        epoch: ledger.epoch,
        next_epoch: ledger.next_epoch,
        release_seq: ledger.release_seq,
    }
}

fn record_of(row: stock_sale::Model) -> Result<Record> {
    let list_price = match (&row.list_currency, row.list_units, row.list_nanos) {
        (Some(currency), Some(units), Some(nanos)) => Some(Money::from_parts("list_price", currency, units, nanos)?),
        _ => None,
    };
    let sale = Sale {
        id: SaleId::parse("sale", &row.sale_id)?,
        title: row.title,
        description: row.description,
        list_price,
        price: Money::from_parts("price", &row.price_currency, row.price_units, row.price_nanos)?,
        limit: row.per_buyer_limit,
        start_at: row.start_at,
        end_at: row.end_at,
        payment_window: row.payment_window,
        verb: match row.verb {
            OPEN => Verb::Open,
            PAUSED => Verb::Paused,
            CLOSED => Verb::Closed,
            _ => return Err(broken("verb")),
        },
        version: row.version,
        create_at: row.create_at,
        close_at: row.close_at,
    };
    let ledger = Ledger {
        available: row.available,
        held: row.held,
        sold: row.sold,
        total: row.total,
        persisted: row.persisted,
        epoch: row.epoch,
        next_epoch: row.next_epoch,
        release_seq: row.release_seq,
    };
    Ok(Record { sale: sale.into(), ledger })
}

/// Unambiguous: no sale's id has a slash.
fn sale_buyer(sale: &SaleId, buyer: &str) -> String {
    format!("{sale}/{buyer}")
}

fn hold_row(id: HoldId, hold: &Hold, now: i64) -> stock_hold::Model {
    stock_hold::Model {
        hold_id: id.to_string(),
        order_id: hold.order.to_string(),
        sale_id: hold.sale.to_string(),
        sale_buyer: sale_buyer(&hold.sale, hold.buyer.as_str()),
        buyer: hold.buyer.as_str().to_owned(),
        quantity: hold.quantity,
        state: match hold.state {
            HoldState::Locked => LOCKED,
            HoldState::Sold => SOLD,
            HoldState::Released => RELEASED,
            HoldState::Tombstone => TOMBSTONE,
        },
        refusal: hold.refusal.into(),
        grant_epoch: hold.grant_epoch,
        release_seq: hold.release_seq,
        expire_at: hold.expire_at,
        create_at: now,
        update_at: now,
    }
}

fn hold_of(row: stock_hold::Model) -> Result<Hold> {
    Ok(Hold {
        order: read_id(&row.order_id)?,
        sale: SaleId::parse("sale", &row.sale_id)?,
        buyer: BuyerId::parse(&row.buyer)?,
        quantity: row.quantity,
        state: match row.state {
            LOCKED => HoldState::Locked,
            SOLD => HoldState::Sold,
            RELEASED => HoldState::Released,
            TOMBSTONE => HoldState::Tombstone,
            _ => return Err(broken("state")),
        },
        refusal: Reason::try_from(row.refusal).map_err(|_| broken("refusal"))?,
        grant_epoch: row.grant_epoch,
        release_seq: row.release_seq,
        expire_at: row.expire_at,
    })
}

fn outgoing_row(sale: &SaleId, refund: &Refund, now: i64) -> stock_outbox::ActiveModel {
    let (kind, hold, buyer, quantity, release_seq, grant_epoch) = match refund {
        Refund::Release(Release { hold, buyer, quantity, seq, grant_epoch }) => {
            let buyer = buyer.as_ref().map(|b| b.as_str().to_owned()).unwrap_or_default();
            (RELEASE, hold, buyer, *quantity, *seq, *grant_epoch)
        }
        Refund::Return(Return { hold, epoch }) => (RETURN, hold, String::new(), 0, 0, *epoch),
    };
    stock_outbox::ActiveModel {
        id: NotSet,
        sale_id: Set(sale.to_string()),
        kind: Set(kind),
        hold_id: Set(hold.to_string()),
        buyer: Set(buyer),
        quantity: Set(quantity),
        release_seq: Set(release_seq),
        grant_epoch: Set(grant_epoch),
        create_at: Set(now),
    }
}

fn outgoing_of(row: stock_outbox::Model) -> Result<Outgoing> {
    let hold = read_id(&row.hold_id)?;
    let refund = match row.kind {
        RELEASE => Refund::Release(Release {
            hold,
            buyer: if row.buyer.is_empty() { None } else { Some(BuyerId::parse(&row.buyer)?) },
            quantity: row.quantity,
            seq: row.release_seq,
            grant_epoch: row.grant_epoch,
        }),
        RETURN => Refund::Return(Return { hold, epoch: row.grant_epoch }),
        _ => return Err(broken("kind")),
    };
    Ok(Outgoing { id: row.id, sale: SaleId::parse("sale", &row.sale_id)?, refund, create_at: row.create_at })
}
