//! Books in SQL. A batch is a handful of statements, whatever its size.
//!
//! The guard row is the order's lock: every transaction that writes takes the guards of its orders first, in order of
//! the key, and may then trust what it reads of their charges. Only the lease of [`Store::take_due`] is written without;
//! it says when to ask and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use async_trait::async_trait;
use mesh::sql::{self, fault, transaction};
use proto::{BuyerId, Error, Money, OrderId, error::Result};
use sea_orm::{
    ActiveValue::{NotSet, Set},
    DatabaseConnection, DatabaseTransaction, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
    prelude::*,
    sea_query::{LockBehavior, LockType, OnConflict},
};

use super::{Announcement, Open, Request, Store};
use crate::{
    domain::{Answer, Book, Charge, Command, PaymentId, State, Times, reused},
    wire,
};

mod payment_charge {
    //! The table, see the crate `migrations`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "payment_charge")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub payment_id: String,
        pub order_id: String,
        pub buyer: String,
        pub currency: String,
        pub units: i64,
        pub nanos: i32,
        pub method: String,
        pub state: i32,
        pub decline_code: Option<String>,
        pub provider_reference: Option<String>,
        pub surplus: bool,
        pub asked: i32,
        pub ask_at: Option<i64>,
        pub create_at: i64,
        pub update_at: i64,
        pub version: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod payment_order_guard {
    //! The table, see the crate `migrations`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "payment_order_guard")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub order_id: String,
        pub voided: bool,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod payment_outbox {
    //! The table, see the crate `migrations`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "payment_outbox")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub seq: i64,
        pub message_id: String,
        pub payload: Vec<u8>,
        pub traceparent: Option<String>,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

use payment_charge as charge;
use payment_order_guard as guard;
use payment_outbox as outbox;

/// Books in a SQL database.
#[derive(Clone, Debug)]
pub struct SqlStore {
    db: sql::Database,
}

type Books = BTreeMap<OrderId, Book>;

impl SqlStore {
    /// On a migrated database.
    pub fn new(db: DatabaseConnection) -> Self {
        Self { db: db.into() }
    }
}

#[async_trait]
impl Store for SqlStore {
    async fn run(&self, requests: Vec<Request>, times: Times) -> Result<Vec<Result<Answer>>> {
        let requests = Arc::new(requests);
        let answers = transaction(&self.db, |tx| {
            let requests = requests.clone();
            Box::pin(async move {
                make_guards(tx, &requests).await?;
                let order_ids: BTreeSet<_> = requests.iter().map(|r| r.order_id).collect();
                let mut books = load(tx, order_ids, Access::Write).await?;
                let elsewhere = begun_elsewhere(tx, &requests).await?;
                let before = books.clone();
                let (mut answers, mut announcements) = (Vec::with_capacity(requests.len()), Vec::new());
                for request in requests.iter() {
                    let book = books.entry(request.order_id).or_insert_with(|| Book::new(request.order_id));
                    let answer = match &request.command {
                        Command::Begin(new) if elsewhere.get(&new.payment_id).is_some_and(|o| *o != book.order_id) => {
                            Err(reused())
                        }
                        command => book.apply(command, times),
                    };
                    answers.push(answer);
                    for charge in book.announcements.drain(..) {
                        let (message_id, payload) = wire::settled(&charge);
                        announcements.push(outbox::ActiveModel {
                            seq: NotSet,
                            message_id: Set(message_id),
                            payload: Set(payload.to_vec()),
                            traceparent: Set(request.traceparent.clone()),
                        });
                    }
                }
                save(tx, &before, &books).await?;
                for chunk in sql::chunks(&announcements) {
                    outbox::Entity::insert_many(chunk.to_vec()).exec_without_returning(tx).await?;
                }
                Ok(answers)
            })
        })
        .await?;
        Ok(answers)
    }

    async fn read(&self, payment_ids: Vec<PaymentId>) -> Result<Vec<Option<Open>>> {
        let payment_ids = Arc::new(payment_ids);
        let found = transaction(&self.db, |tx| {
            let payment_ids = payment_ids.clone();
            Box::pin(async move {
                let mut order_ids = BTreeSet::new();
                for chunk in sql::key_chunks(&payment_ids) {
                    let wanted = charge::Column::PaymentId.is_in(chunk.iter().map(PaymentId::as_str));
                    for row in charge::Entity::find().filter(wanted).all(tx).await? {
                        order_ids.insert(row.order_id.parse()?);
                    }
                }
                let books = load(tx, order_ids, Access::Read).await?;
                let open: HashMap<_, _> = open(&books).map(|o| (o.charge.payment_id.clone(), o)).collect();
                Ok(payment_ids.iter().map(|id| open.get(id).cloned()).collect::<Vec<_>>())
            })
        })
        .await?;
        Ok(found)
    }

    async fn take_due(&self, now_ms: i64, lease_until_ms: i64, limit: u64) -> Result<Vec<Open>> {
        let taken = transaction(&self.db, |tx| {
            Box::pin(async move {
                let due = || charge::Column::AskAt.lte(now_ms);
                let rows = charge::Entity::find()
                    .filter(due())
                    .order_by_asc(charge::Column::AskAt)
                    .limit(limit)
                    // What another process is taking right now is not waited for.
                    .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked)
                    .all(tx)
                    .await?;
                if rows.is_empty() {
                    return Ok(Vec::new());
                }
                let ids: BTreeSet<_> = rows.iter().map(|r| r.payment_id.clone()).collect();
                charge::Entity::update_many()
                    .col_expr(charge::Column::AskAt, Expr::value(lease_until_ms))
                    .filter(charge::Column::PaymentId.is_in(ids.iter().map(String::as_str)))
                    // Not one that was settled, or taken by another process, since.
                    .filter(due())
                    .exec(tx)
                    .await?;
                let order_ids = rows.iter().map(|r| r.order_id.parse()).collect::<Result<_>>()?;
                let books = load(tx, order_ids, Access::Read).await?;
                Ok(open(&books).filter(|o| ids.contains(o.charge.payment_id.as_str())).collect())
            })
        })
        .await?;
        Ok(taken)
    }

    async fn announcements(&self, limit: u64) -> Result<Vec<Announcement>> {
        let rows =
            outbox::Entity::find().order_by_asc(outbox::Column::Seq).limit(limit).all(&self.db).await.map_err(fault)?;
        let rows = rows.into_iter().map(|row| Announcement {
            seq: row.seq,
            message_id: row.message_id,
            payload: row.payload.into(),
            traceparent: row.traceparent,
        });
        Ok(rows.collect())
    }

    async fn forget(&self, seqs: Vec<i64>) -> Result<()> {
        for chunk in sql::key_chunks(&seqs) {
            let published = outbox::Column::Seq.is_in(chunk.iter().copied());
            outbox::Entity::delete_many().filter(published).exec(&self.db).await.map_err(fault)?;
        }
        Ok(())
    }
}

/// Makes the guards of orders whose money may never have been touched. Two that come first at once meet here.
async fn make_guards(tx: &DatabaseTransaction, requests: &[Request]) -> Result<(), DbErr> {
    let first = |command: &Command| matches!(command, Command::Begin(_) | Command::Void);
    let new: BTreeSet<_> = requests.iter().filter(|r| first(&r.command)).map(|r| r.order_id.to_string()).collect();
    let new: Vec<_> = new.into_iter().collect();
    for chunk in sql::chunks(&new) {
        let rows = chunk.iter().map(|id| guard::ActiveModel { order_id: Set(id.clone()), voided: Set(false) });
        let stays = OnConflict::column(guard::Column::OrderId).do_nothing_on([guard::Column::OrderId]).to_owned();
        guard::Entity::insert_many(rows).on_conflict(stays).exec_without_returning(tx).await?;
    }
    Ok(())
}

/// What books are read for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// To look.
    Read,
    /// To change: takes the guards, in order of the key, before it reads what they guard.
    Write,
}

/// Reads the books of these orders. Of an order that nobody asked to pay there is none.
async fn load(
    tx: &DatabaseTransaction,
    order_ids: BTreeSet<OrderId>,
    access: Access,
) -> Result<Books, mesh::sql::Error> {
    let ids: Vec<_> = order_ids.iter().map(ToString::to_string).collect();
    let mut books = Books::new();
    for chunk in sql::key_chunks(&ids) {
        let mut guards = guard::Entity::find()
            .filter(guard::Column::OrderId.is_in(chunk.clone()))
            .order_by_asc(guard::Column::OrderId);
        if access == Access::Write {
            guards = guards.lock_exclusive();
        }
        for row in guards.all(tx).await? {
            let order_id = row.order_id.parse()?;
            books.insert(order_id, Book { voided: row.voided, ..Book::new(order_id) });
        }
        let charges = charge::Entity::find()
            .filter(charge::Column::OrderId.is_in(chunk))
            .order_by_asc(charge::Column::CreateAt)
            .order_by_asc(charge::Column::PaymentId)
            .all(tx)
            .await?;
        for row in charges {
            let charge = from_row(row)?;
            books.entry(charge.order_id).or_insert_with(|| Book::new(charge.order_id)).charges.push(charge);
        }
    }
    Ok(books)
}

/// Charges to begin whose id is known already, and for which order. An id belongs to one order only.
async fn begun_elsewhere(
    tx: &DatabaseTransaction,
    requests: &[Request],
) -> Result<HashMap<PaymentId, OrderId>, mesh::sql::Error> {
    let ids: Vec<_> = requests
        .iter()
        .filter_map(|r| match &r.command {
            Command::Begin(new) => Some(new.payment_id.as_str()),
            _ => None,
        })
        .collect();
    let mut known = HashMap::new();
    for chunk in sql::key_chunks(&ids) {
        let rows: Vec<(String, String)> = charge::Entity::find()
            .select_only()
            .column(charge::Column::PaymentId)
            .column(charge::Column::OrderId)
            .filter(charge::Column::PaymentId.is_in(chunk.iter().copied()))
            .into_tuple()
            .all(tx)
            .await?;
        for (payment_id, order_id) in rows {
            known.insert(payment_id.parse()?, order_id.parse()?);
        }
    }
    // Two orders that begin the same id in one batch: the first has it.
    for request in requests {
        if let Command::Begin(new) = &request.command {
            known.entry(new.payment_id.clone()).or_insert(request.order_id);
        }
    }
    Ok(known)
}

/// Writes what changed.
async fn save(tx: &DatabaseTransaction, before: &Books, after: &Books) -> Result<(), DbErr> {
    let (mut guards, mut charges) = (Vec::new(), Vec::new());
    for (order_id, book) in after {
        let old = before.get(order_id);
        if book.voided != old.is_some_and(|b| b.voided) {
            guards.push(guard::ActiveModel { order_id: Set(order_id.to_string()), voided: Set(book.voided) });
        }
        let known = old.map_or(&[][..], |b| &b.charges);
        charges.extend(book.charges.iter().filter(|c| !known.contains(c)).map(to_row));
    }
    for chunk in sql::chunks(&guards) {
        let voids = OnConflict::column(guard::Column::OrderId).update_column(guard::Column::Voided).to_owned();
        guard::Entity::insert_many(chunk.to_vec()).on_conflict(voids).exec_without_returning(tx).await?;
    }
    for chunk in sql::chunks(&charges) {
        // New ones are inserted; of known ones, locked by their guard, everything that can change is written.
        let changes = OnConflict::column(charge::Column::PaymentId)
            .update_columns([
                charge::Column::State,
                charge::Column::DeclineCode,
                charge::Column::ProviderReference,
                charge::Column::Surplus,
                charge::Column::Asked,
                charge::Column::AskAt,
                charge::Column::UpdateAt,
                charge::Column::Version,
            ])
            .to_owned();
        charge::Entity::insert_many(chunk.to_vec()).on_conflict(changes).exec_without_returning(tx).await?;
    }
    Ok(())
}

fn open(books: &Books) -> impl Iterator<Item = Open> {
    books.values().flat_map(|book| {
        book.charges.iter().map(|charge| Open { charge: charge.clone(), step: book.step(&charge.payment_id) })
    })
}

fn to_row(charge: &Charge) -> charge::ActiveModel {
    charge::ActiveModel {
        payment_id: Set(charge.payment_id.to_string()),
        order_id: Set(charge.order_id.to_string()),
        buyer: Set(charge.buyer.to_string()),
        currency: Set(charge.amount.currency().to_owned()),
        units: Set(charge.amount.units()),
        nanos: Set(charge.amount.nanos()),
        method: Set(charge.method.clone()),
        state: Set(charge.state.into()),
        decline_code: Set(charge.decline_code.clone()),
        provider_reference: Set(charge.reference.clone()),
        surplus: Set(charge.surplus),
        asked: Set(charge.asked),
        ask_at: Set(charge.ask_at_ms),
        create_at: Set(charge.create_at_ms),
        update_at: Set(charge.update_at_ms),
        version: Set(charge.version),
    }
}

/// What does not fit the domain was not written by us.
fn from_row(row: charge::Model) -> Result<Charge> {
    let id = row.payment_id.clone();
    let read = || -> Result<Charge> {
        Ok(Charge {
            payment_id: row.payment_id.parse()?,
            order_id: row.order_id.parse()?,
            buyer: BuyerId::parse(&row.buyer)?,
            amount: Money::from_parts("amount", &row.currency, row.units, row.nanos)?,
            method: row.method,
            state: State::try_from(row.state).map_err(|_| Error::internal("unknown state"))?,
            decline_code: row.decline_code,
            reference: row.provider_reference,
            surplus: row.surplus,
            asked: row.asked,
            ask_at_ms: row.ask_at,
            create_at_ms: row.create_at,
            update_at_ms: row.update_at,
            version: row.version,
        })
    };
    read().map_err(|error| Error::internal(format!("payment_charge {id}: {error}")))
}
