//! Order records in SQL. A batch is a handful of statements, whatever its size.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use async_trait::async_trait;
use mesh::sql::{self, transaction};
use proto::{BuyerId, Error, Money, OrderId, Reason, SaleId, error::Result, v1::OrderState};
use sea_orm::{
    ActiveValue::Set, Condition, ConnectionTrait, DatabaseConnection, DbErr, EntityTrait, QueryFilter, QueryOrder,
    QuerySelect, prelude::*, sea_query::OnConflict,
};

use super::{Page, Store, Transitioned};
use crate::domain::{Change, Record, Transition};

mod order_record {
    //! The table, see the crate `migrations`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "order_record")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub order_id: String,
        pub buyer: String,
        pub sale_id: String,
        pub quantity: i64,
        pub currency: String,
        pub units: i64,
        pub nanos: i32,
        pub state: i32,
        pub reject_reason: i32,
        pub create_at: i64,
        pub expire_at: i64,
        pub pay_at: Option<i64>,
        pub close_at: Option<i64>,
        pub version: i64,
        pub saga_version: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

use order_record::{ActiveModel, Column, Entity, Model};

/// Order records in a SQL database.
#[derive(Clone, Debug)]
pub struct SqlStore {
    db: sql::Database,
}

impl SqlStore {
    /// On a migrated database.
    pub fn new(db: DatabaseConnection) -> Self {
        Self { db: db.into() }
    }
}

#[async_trait]
impl Store for SqlStore {
    async fn create(&self, records: Vec<Record>) -> Result<Vec<Record>> {
        // In order of the key, so that concurrent batches meet in the same order; the first of equals stays.
        let mut by_id = BTreeMap::new();
        for record in records {
            by_id.entry(record.order_id).or_insert(record);
        }
        let by_id = Arc::new(by_id);
        // Nearly always all of them are new: inserting finds out without reading first.
        let inserted = transaction(&self.db, |tx| {
            let by_id = by_id.clone();
            Box::pin(async move { Ok(insert(tx, by_id.values(), None).await?) })
        })
        .await;
        match inserted {
            Ok(()) => return Ok(Arc::unwrap_or_clone(by_id).into_values().collect()),
            Err(sql::Error::Db(error)) if sql::is_duplicate(&error) => {}
            Err(error) => return Err(error.into()),
        }
        let created = transaction(&self.db, |tx| {
            let by_id = by_id.clone();
            Box::pin(async move {
                let there = existing(tx, by_id.keys()).await?;
                let missing: Vec<_> = by_id.values().filter(|r| !there.contains(&r.order_id.to_string())).collect();
                // Another transaction may have written one since: then that one stays.
                let stays = OnConflict::column(Column::OrderId).do_nothing_on([Column::OrderId]).to_owned();
                insert(tx, missing.iter().copied(), Some(stays)).await?;
                Ok(missing.into_iter().cloned().collect::<Vec<_>>())
            })
        })
        .await?;
        Ok(created)
    }

    async fn transition(&self, transitions: Vec<Transition>) -> Result<Transitioned> {
        let transitions = Arc::new(transitions);
        let transitioned = transaction(&self.db, |tx| {
            let transitions = transitions.clone();
            Box::pin(async move {
                let ids: BTreeSet<_> = transitions.iter().map(|t| t.order_id).collect();
                let ids: Vec<_> = ids.into_iter().collect();
                let mut records = HashMap::with_capacity(ids.len());
                for chunk in sql::key_chunks(&ids) {
                    // Locked in order of the key, or two batches of the same orders would wait for each other.
                    let rows = select(&chunk).order_by_asc(Column::OrderId).lock_exclusive().all(tx).await?;
                    for row in rows {
                        let record = from_row(row)?;
                        records.insert(record.order_id, record);
                    }
                }
                let (mut results, mut touched, mut moved) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
                for transition in transitions.iter() {
                    let applied = match records.get_mut(&transition.order_id) {
                        Some(record) => record.apply(transition),
                        None => Err(Error::not_found("order")),
                    };
                    if matches!(applied, Ok(Change::Noted | Change::Moved)) {
                        touched.insert(transition.order_id);
                    }
                    if matches!(applied, Ok(Change::Moved)) {
                        moved.insert(transition.order_id);
                    }
                    results.push(applied.map(|_| ()));
                }
                let rows: Vec<_> = touched.iter().map(|id| to_row(&records[id])).collect();
                for chunk in sql::chunks(&rows) {
                    // The rows are there and locked: the insert's only effect is to update them all in one statement.
                    let moves = OnConflict::column(Column::OrderId)
                        .update_columns([
                            Column::State,
                            Column::PayAt,
                            Column::CloseAt,
                            Column::Version,
                            Column::SagaVersion,
                        ])
                        .to_owned();
                    Entity::insert_many(chunk.to_vec()).on_conflict(moves).exec_without_returning(tx).await?;
                }
                let moved = moved.iter().map(|id| records[id].clone()).collect();
                Ok(Transitioned { results, moved })
            })
        })
        .await?;
        Ok(transitioned)
    }

    async fn get(&self, order_ids: Vec<OrderId>) -> Result<HashMap<OrderId, Record>> {
        let mut records = HashMap::with_capacity(order_ids.len());
        for chunk in sql::key_chunks(&order_ids) {
            for row in select(&chunk).all(&self.db).await.map_err(sql::fault)? {
                let record = from_row(row)?;
                records.insert(record.order_id, record);
            }
        }
        Ok(records)
    }

    async fn list(&self, page: Page) -> Result<Vec<Record>> {
        let mut query = Entity::find().filter(Column::Buyer.eq(page.buyer.as_str()));
        if let Some(sale_id) = &page.sale_id {
            query = query.filter(Column::SaleId.eq(sale_id.as_str()));
        }
        if let Some(after) = page.after {
            let same_time = Condition::all()
                .add(Column::CreateAt.eq(after.create_at_ms))
                .add(Column::OrderId.lt(after.order_id.to_string()));
            query = query.filter(Condition::any().add(Column::CreateAt.lt(after.create_at_ms)).add(same_time));
        }
        let rows = query
            .order_by_desc(Column::CreateAt)
            .order_by_desc(Column::OrderId)
            .limit(page.limit)
            .all(&self.db)
            .await
            .map_err(sql::fault)?;
        rows.into_iter().map(from_row).collect()
    }
}

fn select(ids: &[OrderId]) -> sea_orm::Select<Entity> {
    Entity::find().filter(Column::OrderId.is_in(ids.iter().map(ToString::to_string)))
}

/// Inserts all of them. Without a word on what stays where two meet, meeting is an error.
async fn insert(
    tx: &impl ConnectionTrait,
    records: impl Iterator<Item = &Record>,
    stays: Option<OnConflict>,
) -> std::result::Result<(), DbErr> {
    let rows: Vec<_> = records.map(to_row).collect();
    for chunk in sql::chunks(&rows) {
        let mut insert = Entity::insert_many(chunk.to_vec());
        if let Some(stays) = &stays {
            insert = insert.on_conflict(stays.clone());
        }
        insert.exec_without_returning(tx).await?;
    }
    Ok(())
}

async fn existing(
    db: &impl ConnectionTrait,
    ids: impl Iterator<Item = &OrderId>,
) -> std::result::Result<HashSet<String>, DbErr> {
    let ids: Vec<_> = ids.map(ToString::to_string).collect();
    let mut there = HashSet::new();
    for chunk in sql::key_chunks(&ids) {
        let found: Vec<String> = Entity::find()
            .select_only()
            .column(Column::OrderId)
            .filter(Column::OrderId.is_in(chunk))
            .into_tuple()
            .all(db)
            .await?;
        there.extend(found);
    }
    Ok(there)
}

fn to_row(record: &Record) -> ActiveModel {
    ActiveModel {
        order_id: Set(record.order_id.to_string()),
        buyer: Set(record.buyer.to_string()),
        sale_id: Set(record.sale_id.to_string()),
        quantity: Set(record.quantity),
        currency: Set(record.amount.currency().to_owned()),
        units: Set(record.amount.units()),
        nanos: Set(record.amount.nanos()),
        state: Set(record.state.into()),
        reject_reason: Set(record.reject_reason.unwrap_or(Reason::Unspecified).into()),
        create_at: Set(record.create_at_ms),
        expire_at: Set(record.expire_at_ms),
        pay_at: Set(record.pay_at_ms),
        close_at: Set(record.close_at_ms),
        version: Set(record.version),
        saga_version: Set(record.saga_version),
    }
}

/// What does not fit the domain was not written by us.
fn from_row(row: Model) -> Result<Record> {
    let id = row.order_id.clone();
    let broken = move |error: Error| Error::internal(format!("order_record {id}: {error}"));
    let read = || -> Result<Record> {
        let unknown = |what: &str| Error::internal(format!("unknown {what}"));
        let reason = Reason::try_from(row.reject_reason).map_err(|_| unknown("reject_reason"))?;
        Ok(Record {
            order_id: row.order_id.parse()?,
            buyer: BuyerId::parse(&row.buyer)?,
            sale_id: SaleId::parse("sale_id", &row.sale_id)?,
            quantity: row.quantity,
            amount: Money::from_parts("amount", &row.currency, row.units, row.nanos)?,
            state: OrderState::try_from(row.state).map_err(|_| unknown("state"))?,
            reject_reason: (reason != Reason::Unspecified).then_some(reason),
            create_at_ms: row.create_at,
            expire_at_ms: row.expire_at,
            pay_at_ms: row.pay_at,
            close_at_ms: row.close_at,
            version: row.version,
            saga_version: row.saga_version,
        })
    };
    read().map_err(broken)
}
