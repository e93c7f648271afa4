//! The store on SQL: SQLite, PostgreSQL, MySQL/MariaDB.
//!
//! A batch is a handful of statements, however many sagas it holds: rows are locked by one select in order of their
//! ids, so that two batches cannot deadlock, the log gets one multi-row insert, and one statement sets every column that
//! changed. The log's primary key, (saga, version), is the compare-and-set: whatever
//! else may fail, two transitions from one version cannot both be written. Whoever has just seen a saga need not read it
//! again, for that reason ([`Store::advance`]).

use std::collections::{BTreeSet, HashMap};

use async_trait::async_trait;
use mesh::sql::{self, Error as SqlError};
use proto::{BuyerId, Error, Money, OrderId, Reason, SaleId, error::Result, v1::action::Outcome};
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DeriveIden, FromQueryResult, Order, StatementBuilder,
    prelude::Expr,
    sea_query::{Alias, ExprTrait, LockBehavior, LockType, OnConflict, Query, SelectStatement, Value},
};

use super::{Action, Decide, Entry, Filter, Postponed, Rejected, Row, Store, Turn, Verdict, Which};

/// What fits the columns for people.
const TEXT_LIMIT: usize = 500;

#[derive(Clone, Copy, DeriveIden, PartialEq)]
enum Col {
    #[sea_orm(iden = "coordinator_saga")]
    Table,
    SagaId,
    Kind,
    State,
    Version,
    Stuck,
    Attempts,
    NextAttemptAt,
    LastError,
    OrderId,
    SaleId,
    Buyer,
    Quantity,
    Currency,
    Units,
    Nanos,
    HoldId,
    GrantEpoch,
    ExpireAt,
    RejectReason,
    PaymentId,
    PaymentMethod,
    PaymentRequestId,
    DeclineCode,
    Traceparent,
    CloseAt,
    CreateAt,
    UpdateAt,
}

/// What a new saga differs in; the other columns have defaults.
const INSERTED: [Col; 20] = [
    Col::SagaId,
    Col::Kind,
    Col::State,
    Col::Version,
    Col::NextAttemptAt,
    Col::OrderId,
    Col::SaleId,
    Col::Buyer,
    Col::Quantity,
    Col::Currency,
    Col::Units,
    Col::Nanos,
    Col::HoldId,
    Col::GrantEpoch,
    Col::ExpireAt,
    Col::RejectReason,
    Col::Traceparent,
    Col::CloseAt,
    Col::CreateAt,
    Col::UpdateAt,
];

/// What a transition may change.
const CHANGING: [Col; 15] = [
    Col::State,
    Col::Version,
    Col::Stuck,
    Col::Attempts,
    Col::NextAttemptAt,
    Col::LastError,
    Col::HoldId,
    Col::GrantEpoch,
    Col::PaymentId,
    Col::PaymentMethod,
    Col::PaymentRequestId,
    Col::DeclineCode,
    Col::RejectReason,
    Col::CloseAt,
    Col::UpdateAt,
];

#[derive(Clone, Copy, DeriveIden)]
enum LogCol {
    #[sea_orm(iden = "coordinator_saga_event")]
    Table,
    SagaId,
    Version,
    Event,
    FromState,
    ToState,
    Detail,
    At,
}

#[derive(Clone, Copy, DeriveIden)]
enum ActionCol {
    #[sea_orm(iden = "coordinator_action")]
    Table,
    ActionId,
    Operator,
    Verb,
    Target,
    Detail,
    Reason,
    Outcome,
    Error,
    At,
}

#[derive(FromQueryResult)]
struct Record {
    saga_id: String,
    kind: String,
    state: String,
    version: i64,
    stuck: bool,
    attempts: i32,
    next_attempt_at: Option<i64>,
    last_error: String,
    order_id: String,
    sale_id: String,
    buyer: String,
    quantity: i64,
    currency: String,
    units: i64,
    nanos: i32,
    hold_id: String,
    grant_epoch: i64,
    expire_at: i64,
    reject_reason: i32,
    payment_id: String,
    payment_method: String,
    payment_request_id: String,
    decline_code: String,
    traceparent: String,
    close_at: Option<i64>,
    create_at: i64,
    update_at: i64,
}

impl TryFrom<Record> for Row {
    type Error = Error;

    fn try_from(record: Record) -> Result<Self> {
        let id = |text: &str| text.parse::<OrderId>();
        Ok(Row {
            saga_id: id(&record.saga_id)?,
            kind: record.kind,
            state: record.state,
            version: record.version,
            stuck: record.stuck,
            attempts: record.attempts,
            next_attempt_at: record.next_attempt_at,
            last_error: record.last_error,
            order_id: id(&record.order_id)?,
            sale_id: SaleId::parse("sale", &record.sale_id)?,
            buyer: BuyerId::parse(&record.buyer)?,
            quantity: record.quantity,
            amount: Money::from_parts("amount", &record.currency, record.units, record.nanos)?,
            hold_id: id(&record.hold_id)?,
            grant_epoch: record.grant_epoch,
            expire_at: record.expire_at,
            reject_reason: Reason::try_from(record.reject_reason).unwrap_or_default(),
            payment_id: if record.payment_id.is_empty() { None } else { Some(id(&record.payment_id)?) },
            payment_method: record.payment_method,
            payment_request_id: record.payment_request_id,
            decline_code: record.decline_code,
            traceparent: record.traceparent,
            close_at: record.close_at,
            create_at: record.create_at,
            update_at: record.update_at,
        })
    }
}

/// What a column holds for a row.
fn value(column: Col, row: &Row) -> Value {
    match column {
        Col::Table => unreachable!("not a column"),
        Col::SagaId => row.saga_id.to_string().into(),
        Col::Kind => row.kind.as_str().into(),
        Col::State => row.state.as_str().into(),
        Col::Version => row.version.into(),
        Col::Stuck => row.stuck.into(),
        Col::Attempts => row.attempts.into(),
        Col::NextAttemptAt => row.next_attempt_at.into(),
        Col::LastError => clipped(&row.last_error).into(),
        Col::OrderId => row.order_id.to_string().into(),
        Col::SaleId => row.sale_id.as_str().into(),
        Col::Buyer => row.buyer.as_str().into(),
        Col::Quantity => row.quantity.into(),
        Col::Currency => row.amount.currency().into(),
        Col::Units => row.amount.units().into(),
        Col::Nanos => row.amount.nanos().into(),
        Col::HoldId => row.hold_id.to_string().into(),
        Col::GrantEpoch => row.grant_epoch.into(),
        Col::ExpireAt => row.expire_at.into(),
        Col::RejectReason => i32::from(row.reject_reason).into(),
        Col::PaymentId => row.payment_id.map(|id| id.to_string()).unwrap_or_default().into(),
        Col::PaymentMethod => row.payment_method.as_str().into(),
        Col::PaymentRequestId => row.payment_request_id.as_str().into(),
        Col::DeclineCode => row.decline_code.as_str().into(),
        Col::Traceparent => row.traceparent.as_str().into(),
        Col::CloseAt => row.close_at.into(),
        Col::CreateAt => row.create_at.into(),
        Col::UpdateAt => row.update_at.into(),
    }
}

/// At most as much as the column takes, cut between characters.
fn clipped(text: &str) -> &str {
    text.char_indices().nth(TEXT_LIMIT).map_or(text, |(end, _)| &text[..end])
}

/// Sagas in SQL.
#[derive(Clone, Debug)]
pub struct SqlStore {
    db: sql::Database,
}

impl SqlStore {
    /// On a database that is migrated.
    pub fn new(db: DatabaseConnection) -> Self {
        Self { db: db.into() }
    }
}

fn select_rows() -> SelectStatement {
    Query::select().expr(Expr::cust("*")).from(Col::Table).to_owned()
}

/// Said twice: the one is what the partial index says of itself, the other is what MySQL can look up.
fn is_stuck() -> Expr {
    Expr::col(Col::Stuck).and(Expr::col(Col::Stuck).eq(true))
}

fn is_of(Which { kind, states }: Which) -> Expr {
    Expr::col(Col::State).is_in(states).and(Expr::col(Col::Kind).eq(kind))
}

fn texts(ids: &[OrderId]) -> impl Iterator<Item = String> {
    ids.iter().map(ToString::to_string)
}

async fn rows(on: &impl ConnectionTrait, statement: &impl StatementBuilder) -> Result<Vec<Row>, SqlError> {
    let records = on.query_all(statement).await?;
    let mut rows = Vec::with_capacity(records.len());
    for record in &records {
        let row = Record::from_query_result(record, "")?;
        let id = row.saga_id.clone();
        rows.push(Row::try_from(row).map_err(|e| Error::internal(format!("saga row {id}: {e}")))?);
    }
    Ok(rows)
}

async fn write_log(tx: &DatabaseTransaction, entries: &[(OrderId, Entry)], replayed: bool) -> Result<(), SqlError> {
    for chunk in sql::chunks(entries) {
        let mut insert = Query::insert();
        insert.into_table(LogCol::Table).columns([
            LogCol::SagaId,
            LogCol::Version,
            LogCol::Event,
            LogCol::FromState,
            LogCol::ToState,
            LogCol::Detail,
            LogCol::At,
        ]);
        for (id, entry) in chunk {
            insert.values_panic([
                id.to_string().into(),
                entry.version.into(),
                entry.event.as_str().into(),
                entry.from.as_str().into(),
                entry.to.as_str().into(),
                clipped(&entry.detail).into(),
                entry.at.into(),
            ]);
        }
        if replayed {
            let key = [LogCol::SagaId, LogCol::Version];
            insert.on_conflict(OnConflict::columns(key).do_nothing_on(key).to_owned());
        }
        tx.execute(&insert).await?;
    }
    Ok(())
}

/// One statement for many rows. They are there: the insert's only effect is to carry the new values of all
/// of them. (An UPDATE with a CASE per column does the same at a cost that grows with the square of the batch.) It names
/// every column that may change, changed or not: texts that differ by what changed would crowd each other out of the
/// connections' caches, and parsing one takes longer than running it.
async fn write_rows(tx: &DatabaseTransaction, rows: &[Row]) -> Result<(), SqlError> {
    let others = CHANGING.iter().filter(|column| !INSERTED.contains(column));
    let columns: Vec<Col> = INSERTED.iter().chain(others).copied().collect();
    let mut insert = Query::insert();
    insert.into_table(Col::Table).columns(columns.iter().copied());
    for row in rows {
        insert.values_panic(columns.iter().map(|column| Expr::value(value(*column, row))));
    }
    insert.on_conflict(OnConflict::column(Col::SagaId).update_columns(CHANGING).to_owned());
    tx.execute(&insert).await?;
    Ok(())
}

#[async_trait]
impl Store for SqlStore {
    async fn insert(&self, sagas: Vec<(Row, Entry)>) -> Result<()> {
        if sagas.is_empty() {
            return Ok(());
        }
        let sagas = std::sync::Arc::new(sagas);
        sql::transaction(&self.db, move |tx| {
            let sagas = sagas.clone();
            Box::pin(async move {
                for chunk in sql::chunks(&sagas) {
                    let mut insert = Query::insert();
                    insert.into_table(Col::Table).columns(INSERTED);
                    for (row, _) in chunk {
                        insert.values_panic(INSERTED.map(|column| Expr::value(value(column, row))));
                    }
                    let keep = OnConflict::column(Col::SagaId).do_nothing_on([Col::SagaId]).to_owned();
                    tx.execute(insert.on_conflict(keep)).await?;
                }
                let entries: Vec<_> = sagas.iter().map(|(row, entry)| (row.saga_id, entry.clone())).collect();
                write_log(tx, &entries, true).await
            })
        })
        .await?;
        Ok(())
    }

    async fn load(&self, ids: &[OrderId]) -> Result<HashMap<OrderId, Row>> {
        let mut found = HashMap::with_capacity(ids.len());
        for chunk in sql::key_chunks(ids) {
            let select = select_rows().and_where(Expr::col(Col::SagaId).is_in(texts(&chunk))).to_owned();
            found.extend(rows(&self.db, &select).await?.into_iter().map(|row| (row.saga_id, row)));
        }
        Ok(found)
    }

    async fn change(&self, ids: Vec<OrderId>, decide: Decide) -> Result<Vec<Verdict>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let ids = std::sync::Arc::new(ids);
        let verdicts = sql::transaction(&self.db, move |tx| {
            let (ids, decide) = (ids.clone(), decide.clone());
            Box::pin(async move {
                let mut now: HashMap<OrderId, Row> = HashMap::with_capacity(ids.len());
                let locked: Vec<OrderId> = BTreeSet::from_iter(ids.iter().copied()).into_iter().collect();
                for chunk in sql::key_chunks(&locked) {
                    let select = select_rows()
                        .and_where(Expr::col(Col::SagaId).is_in(texts(&chunk)))
                        .order_by(Col::SagaId, Order::Asc)
                        .lock_exclusive()
                        .to_owned();
                    now.extend(rows(tx, &select).await?.into_iter().map(|row| (row.saga_id, row)));
                }
                let mut changed = BTreeSet::new();
                let mut entries = Vec::new();
                let mut verdicts = Vec::with_capacity(ids.len());
                for (index, id) in ids.iter().enumerate() {
                    let Some(current) = now.get_mut(id) else {
                        verdicts.push(Err(Rejected { current: None }));
                        continue;
                    };
                    let Some((next, entry)) = decide(index, current) else {
                        verdicts.push(Err(Rejected { current: Some(current.clone()) }));
                        continue;
                    };
                    entries.push((*id, entry));
                    changed.insert(*id);
                    *current = next.clone();
                    verdicts.push(Ok(next));
                }
                write_log(tx, &entries, false).await?;
                let after: Vec<Row> = changed.iter().filter_map(|id| now.remove(id)).collect();
                for chunk in sql::chunks(&after) {
                    write_rows(tx, chunk).await?;
                }
                Ok(verdicts)
            })
        })
        .await?;
        Ok(verdicts)
    }

    async fn advance(&self, mut moves: Vec<(Row, Entry)>) -> Result<bool> {
        // Rows before entries, and in order of their ids: as whoever reads them locks them.
        moves.sort_unstable_by_key(|(row, _)| row.saga_id);
        let (rows, entries): (Vec<Row>, Vec<(OrderId, Entry)>) =
            moves.into_iter().map(|(row, entry)| (row.clone(), (row.saga_id, entry))).unzip();
        let moves = std::sync::Arc::new((rows, entries));
        let written = sql::transaction(&self.db, move |tx| {
            let moves = moves.clone();
            Box::pin(async move {
                let (rows, entries) = moves.as_ref();
                for chunk in sql::chunks(rows) {
                    write_rows(tx, chunk).await?;
                }
                write_log(tx, entries, false).await
            })
        });
        match written.await {
            Ok(()) => Ok(true),
            // Somebody was faster: the entry of the same version is there. The rows were not written either.
            Err(SqlError::Db(error)) if sql::is_duplicate(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn postpone(&self, postponed: Vec<Postponed>) -> Result<()> {
        // Sagas that failed together mostly failed alike: one statement for each way.
        let mut alike: HashMap<(Turn, i32, Option<i64>, bool, String), Vec<OrderId>> = HashMap::new();
        for p in postponed {
            let way = (p.turn, p.attempts, p.next_attempt_at, p.stuck, p.last_error);
            alike.entry(way).or_default().push(p.saga_id);
        }
        for ((turn, attempts, next_attempt_at, stuck, last_error), ids) in alike {
            let due = match turn.next_attempt_at {
                Some(at) => Expr::col(Col::NextAttemptAt).eq(at),
                None => Expr::col(Col::NextAttemptAt).is_null(),
            };
            for chunk in sql::key_chunks(&ids) {
                let update = Query::update()
                    .table(Col::Table)
                    .value(Col::Attempts, attempts)
                    .value(Col::NextAttemptAt, next_attempt_at)
                    .value(Col::Stuck, stuck)
                    .value(Col::LastError, clipped(&last_error))
                    .and_where(Expr::col(Col::SagaId).is_in(texts(&chunk)))
                    .and_where(Expr::col(Col::Version).eq(turn.version))
                    .and_where(Expr::col(Col::Attempts).eq(turn.attempts))
                    .and_where(due.clone())
                    .to_owned();
                self.db.execute(&update).await.map_err(sql::fault)?;
            }
        }
        Ok(())
    }

    async fn claim(&self, of: Which, now: i64, until: i64, limit: u64) -> Result<Vec<Row>> {
        let claimed = sql::transaction(&self.db, move |tx| {
            let of = of.clone();
            Box::pin(async move {
                let mut select = select_rows();
                select
                    .and_where(is_of(of))
                    .and_where(Expr::col(Col::NextAttemptAt).lte(now))
                    .order_by(Col::NextAttemptAt, Order::Asc)
                    .limit(limit)
                    // What another coordinator is taking right now is not waited for.
                    .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked);
                let mut claimed = rows(tx, &select).await?;
                if claimed.is_empty() {
                    return Ok(claimed);
                }
                let ids: Vec<OrderId> = claimed.iter().map(|row| row.saga_id).collect();
                for chunk in sql::key_chunks(&ids) {
                    let lease = Query::update()
                        .table(Col::Table)
                        .value(Col::NextAttemptAt, until)
                        .and_where(Expr::col(Col::SagaId).is_in(texts(&chunk)))
                        .to_owned();
                    tx.execute(&lease).await?;
                }
                for row in &mut claimed {
                    row.next_attempt_at = Some(until);
                }
                Ok(claimed)
            })
        })
        .await?;
        Ok(claimed)
    }

    async fn overdue(&self, of: Which, before: i64, limit: u64) -> Result<Vec<OrderId>> {
        let select = Query::select()
            .column(Col::SagaId)
            .from(Col::Table)
            .and_where(is_of(of))
            .and_where(Expr::col(Col::ExpireAt).lt(before))
            .order_by(Col::ExpireAt, Order::Asc)
            .limit(limit)
            .to_owned();
        let found = self.db.query_all(&select).await.map_err(sql::fault)?;
        found.iter().map(|row| row.try_get::<String>("", "saga_id").map_err(sql::fault)?.parse()).collect()
    }

    async fn log(&self, id: OrderId) -> Result<Vec<Entry>> {
        let select = Query::select()
            .columns([LogCol::Version, LogCol::Event, LogCol::FromState, LogCol::ToState, LogCol::Detail, LogCol::At])
            .from(LogCol::Table)
            .and_where(Expr::col(LogCol::SagaId).eq(id.to_string()))
            .order_by(LogCol::Version, Order::Asc)
            .to_owned();
        let found = self.db.query_all(&select).await.map_err(sql::fault)?;
        let read = |row: &sea_orm::QueryResult| -> std::result::Result<Entry, sea_orm::DbErr> {
            Ok(Entry {
                version: row.try_get("", "version")?,
                event: row.try_get("", "event")?,
                from: row.try_get("", "from_state")?,
                to: row.try_get("", "to_state")?,
                detail: row.try_get("", "detail")?,
                at: row.try_get("", "at")?,
            })
        };
        found.iter().map(|row| read(row).map_err(sql::fault)).collect()
    }

    async fn list(&self, filter: &Filter, after: &str, limit: u64) -> Result<Vec<Row>> {
        let wanted = match filter {
            Filter::Stuck => is_stuck(),
            Filter::State(state) => Expr::col(Col::State).eq(state.as_str()),
        };
        let select = select_rows()
            .and_where(wanted)
            .and_where(Expr::col(Col::SagaId).gt(after))
            .order_by(Col::SagaId, Order::Asc)
            .limit(limit)
            .to_owned();
        Ok(rows(&self.db, &select).await?)
    }

    async fn count_stuck(&self) -> Result<u64> {
        let select = Query::select()
            .expr_as(Expr::col(Col::SagaId).count(), Alias::new("stuck"))
            .from(Col::Table)
            .and_where(is_stuck())
            .to_owned();
        let row = self.db.query_one(&select).await.map_err(sql::fault)?;
        let count: i64 = row.map_or(Ok(0), |row| row.try_get("", "stuck")).map_err(sql::fault)?;
        Ok(count.unsigned_abs())
    }

    async fn retry(&self, id: OrderId, now: i64) -> Result<bool> {
        let update = Query::update()
            .table(Col::Table)
            .value(Col::Stuck, false)
            .value(Col::Attempts, 0)
            .value(Col::NextAttemptAt, now)
            .and_where(Expr::col(Col::SagaId).eq(id.to_string()))
            .and_where(Expr::col(Col::Stuck).eq(true))
            .to_owned();
        Ok(self.db.execute(&update).await.map_err(sql::fault)?.rows_affected() > 0)
    }

    async fn record_action(&self, action: Action) -> Result<()> {
        use ActionCol as Col;
        let (id, outcome, error) = (action.id.clone(), i32::from(action.outcome), action.error.clone());
        let insert = Query::insert()
            .into_table(Col::Table)
            .columns([
                Col::ActionId,
                Col::Operator,
                Col::Verb,
                Col::Target,
                Col::Detail,
                Col::Reason,
                Col::Outcome,
                Col::Error,
                Col::At,
            ])
            .values_panic([
                action.id.into(),
                action.operator.into(),
                action.verb.into(),
                action.target.into(),
                action.detail.into(),
                action.reason.into(),
                outcome.into(),
                action.error.into(),
                action.at.into(),
            ])
            .on_conflict(OnConflict::column(Col::ActionId).do_nothing_on([Col::ActionId]).to_owned())
            .to_owned();
        self.db.execute(&insert).await.map_err(sql::fault)?;
        let settle = Query::update()
            .table(Col::Table)
            .value(Col::Outcome, outcome)
            .value(Col::Error, error)
            .and_where(Expr::col(Col::ActionId).eq(id))
            .and_where(Expr::col(Col::Outcome).eq(i32::from(Outcome::Begun)))
            .to_owned();
        self.db.execute(&settle).await.map_err(sql::fault)?;
        Ok(())
    }

    async fn actions(&self, before: Option<&str>, target: &str, limit: u64) -> Result<Vec<Action>> {
        let mut select = Query::select();
        select.expr(Expr::cust("*")).from(ActionCol::Table).order_by(ActionCol::ActionId, Order::Desc).limit(limit);
        if let Some(before) = before {
            select.and_where(Expr::col(ActionCol::ActionId).lt(before));
        }
        if !target.is_empty() {
            select.and_where(Expr::col(ActionCol::Target).eq(target));
        }
        let found = self.db.query_all(&select).await.map_err(sql::fault)?;
        let read = |row: &sea_orm::QueryResult| -> std::result::Result<Action, sea_orm::DbErr> {
            Ok(Action {
                id: row.try_get("", "action_id")?,
                operator: row.try_get("", "operator")?,
                verb: row.try_get("", "verb")?,
                target: row.try_get("", "target")?,
                detail: row.try_get("", "detail")?,
                reason: row.try_get("", "reason")?,
                outcome: Outcome::try_from(row.try_get::<i32>("", "outcome")?).unwrap_or_default(),
                error: row.try_get("", "error")?,
                at: row.try_get("", "at")?,
            })
        };
        found.iter().map(|row| read(row).map_err(sql::fault)).collect()
    }
}
