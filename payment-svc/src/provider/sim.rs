//! The simulated provider. It behaves like something outside of this process: its books are its own (a table that
//! nothing else touches), they survive a `kill -9`, and what it decided happens also when nobody listens any more.
//!
//! | method | the call | and then |
//! | --- | --- | --- |
//! | `sim_approve` | captured at once | |
//! | `sim_decline` | declined at once | |
//! | `sim_timeout` | is never answered | captured after the configured time; its webhook comes twice |
//! | `sim_slow_2s` | is answered after two seconds: captured | a webhook says so, too |
//!
//! While the file of [`SimConfig::silent_while`] is there it is out of order: it hears every call and does what it is
//! asked to, answers none, and sends no webhook.
//!
//! Idempotent by payment id. A charge that is not captured yet can be cancelled; one that was cancelled before it came is
//! refused. Calls that come together share a transaction, so that it is not what a load test measures.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use mesh::{
    batch::{Batcher, Limits},
    clock::Clock,
    lifecycle::Lifecycle,
    sql::{self, transaction},
};
use proto::{Money, OrderId, error::Result, timestamp};
use sea_orm::{
    DatabaseConnection, DatabaseTransaction, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect,
    prelude::*, sea_query::OnConflict,
};

use super::{
    CancelOutcome, ChargeRequest, Provider, ProviderError, ProviderOutcome, ProviderStatus, RefundOutcome,
    SignedWebhook, WebhookEvent, WebhookSink,
    signature::{self, Body, BodyAmount},
};
use crate::domain::{PaymentId, State};

/// What `sim_slow_2s` says.
const SLOW: Duration = Duration::from_secs(2);

/// When a call that is not answered is given up, should the caller still be there.
const HANGING: Duration = Duration::from_secs(60);

/// How often late captures and webhooks are looked for, and a slow call looks whether it was captured.
const EVERY: Duration = Duration::from_millis(100);

/// Late captures, and webhooks, of one round.
const ROUND: u64 = 256;

/// Between a webhook and its deliberate repetition.
const REPEAT_MS: i64 = 300;

/// After a webhook that was not taken, and how often it is tried before the provider gives up.
const RETRY_MS: i64 = 1_000;
const TRIES: i32 = 10;

/// Calls in one transaction, and transactions at once.
const LIMITS: Limits = Limits { overlap_from: 128, ..Limits::DEFAULT };

mod books {
    //! The table, see the crate `migrations`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "payment_sim_charge")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub payment_id: String,
        pub order_id: String,
        pub currency: String,
        pub units: i64,
        pub nanos: i32,
        pub state: i32,
        pub change_at: i64,
        pub capture_at: Option<i64>,
        pub webhooks: i32,
        pub webhook_at: Option<i64>,
        pub webhook_tries: i32,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

use books::{Column, Entity, Model};

/// How the simulated provider behaves.
#[derive(Clone, Debug, Default)]
pub struct SimConfig {
    /// When `sim_timeout` is captured.
    pub late_capture: Duration,
    /// What webhooks are signed with; a random one for this process when there is none.
    pub webhook_secret: Option<Vec<u8>>,
    /// It answers nothing while this file is there.
    pub silent_while: Option<PathBuf>,
}

/// The simulated provider. Cheap to clone.
#[derive(Clone)]
pub struct SimProvider {
    db: sql::Database,
    clock: Clock,
    late_capture: Duration,
    silent_while: Option<Arc<Path>>,
    secret: Arc<[u8]>,
    calls: Batcher<Call, Result<Option<Model>>>,
}

impl fmt::Debug for SimProvider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the secret.
        f.debug_struct("SimProvider").field("late_capture", &self.late_capture).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug)]
enum Call {
    /// The row as it is to be, unless there is one.
    Charge(Model),
    Status(PaymentId),
    /// Leaves a cancelled row where there was none.
    Cancel(PaymentId),
    Refund(PaymentId),
}

impl Call {
    fn payment_id(&self) -> &str {
        match self {
            Call::Charge(row) => &row.payment_id,
            Call::Status(id) | Call::Cancel(id) | Call::Refund(id) => id.as_str(),
        }
    }
}

impl SimProvider {
    /// Opens its books, on a database migrated for payment-svc.
    pub fn start(db: DatabaseConnection, clock: Clock, config: SimConfig, life: &Lifecycle) -> Self {
        let secret = config.webhook_secret.unwrap_or_else(|| rand::random::<[u8; 32]>().to_vec());
        let db = sql::Database::from(db);
        let calls = {
            let (db, clock) = (db.clone(), clock.clone());
            Batcher::start("payment_sim", LIMITS, life.tasks(), move |calls: Vec<Call>| {
                let (db, now_ms) = (db.clone(), clock.now_ms());
                async move {
                    let count = calls.len();
                    match answer(&db, calls, now_ms).await {
                        Ok(rows) => rows.into_iter().map(Ok).collect(),
                        Err(error) => (0..count).map(|_| Err(error.clone())).collect(),
                    }
                }
            })
        };
        let silent_while = config.silent_while.map(Arc::from);
        Self { db, clock, late_capture: config.late_capture, silent_while, secret: secret.into(), calls }
    }

    async fn call(&self, call: Call) -> Result<Option<Model>, ProviderError> {
        let unknown = |error: proto::Error| ProviderError::Unknown(error.to_string());
        let answer = self.calls.submit(call).await.map_err(|e| unknown(e.into()))?.map_err(unknown);
        // Heard and done, which is the hard case: the caller cannot tell it from a call that was lost.
        if self.is_silent() { Err(never_answered("it answers nothing").await) } else { answer }
    }

    /// A file, so that it can be silenced from outside while it runs, in whichever process it does.
    fn is_silent(&self) -> bool {
        self.silent_while.as_deref().is_some_and(Path::exists)
    }

    /// Answers a slow call once it was captured, or cancelled meanwhile.
    async fn until_decided(&self, payment_id: &PaymentId) -> Result<ProviderOutcome, ProviderError> {
        let given_up = tokio::time::Instant::now() + HANGING;
        while tokio::time::Instant::now() < given_up {
            tokio::time::sleep(EVERY).await;
            let row = self.call(Call::Status(payment_id.clone())).await?;
            match row.map(|row| (outcome(&row), row.capture_at)) {
                Some((Some(outcome), _)) => return outcome,
                // Not in a hurry: nothing happens before it is due.
                Some((None, Some(capture_at))) => tokio::time::sleep(self.clock.until(capture_at).min(SLOW)).await,
                _ => {}
            }
        }
        Err(ProviderError::Unknown("it has not decided".to_owned()))
    }

    /// Captures what is due.
    async fn capture_late_ones(&self) -> Result<()> {
        let now_ms = self.clock.now_ms();
        transaction(&self.db, |tx| {
            Box::pin(async move {
                let due = Entity::find().filter(Column::CaptureAt.lte(now_ms)).limit(ROUND).lock_exclusive();
                let mut rows = due.all(tx).await?;
                for row in &mut rows {
                    row.state = State::Captured.into();
                    row.change_at = now_ms;
                    row.capture_at = None;
                    row.webhook_at = Some(now_ms);
                }
                update(tx, rows).await?;
                Ok(())
            })
        })
        .await?;
        Ok(())
    }

    /// Delivers the webhooks that are due, and notes which were taken.
    async fn deliver(&self, sink: &WebhookSink) -> Result<()> {
        if self.is_silent() {
            return Ok(());
        }
        let due = Entity::find().filter(Column::WebhookAt.lte(self.clock.now_ms())).limit(ROUND);
        let rows = due.all(&self.db).await.map_err(mesh::sql::fault)?;
        let mut delivered = Vec::with_capacity(rows.len());
        for mut row in rows {
            let body = Bytes::from(body(&row)?);
            let signature = signature::sign(&self.secret, &body, self.clock.now_ms() / 1_000);
            let taken = sink(SignedWebhook { body, signature }).await;
            let now_ms = self.clock.now_ms();
            match taken {
                Ok(()) => {
                    row.webhooks -= 1;
                    row.webhook_at = (row.webhooks > 0).then_some(now_ms + REPEAT_MS);
                }
                Err(_) => {
                    row.webhook_tries += 1;
                    row.webhook_at = (row.webhook_tries < TRIES).then_some(now_ms + RETRY_MS);
                }
            }
            delivered.push(row);
        }
        if delivered.is_empty() {
            return Ok(());
        }
        // Only what is about webhooks: the rest may have changed meanwhile.
        let notes = OnConflict::column(Column::PaymentId)
            .update_columns([Column::Webhooks, Column::WebhookAt, Column::WebhookTries])
            .to_owned();
        Entity::insert_many(delivered.into_iter().map(whole))
            .on_conflict(notes)
            .exec_without_returning(&self.db)
            .await
            .map_err(mesh::sql::fault)?;
        Ok(())
    }
}

#[async_trait]
impl Provider for SimProvider {
    fn accepts(&self, method: &str) -> bool {
        matches!(method, "sim_approve" | "sim_decline" | "sim_timeout" | "sim_slow_2s")
    }

    async fn charge(&self, request: ChargeRequest) -> Result<ProviderOutcome, ProviderError> {
        let now_ms = self.clock.now_ms();
        let after = |wait: Duration| Some(now_ms + wait.as_millis() as i64);
        let (state, capture_at, webhooks) = match request.method.as_str() {
            "sim_approve" => (State::Captured, None, 0),
            "sim_decline" => (State::Declined, None, 0),
            "sim_timeout" => (State::Pending, after(self.late_capture), 2),
            "sim_slow_2s" => (State::Pending, after(SLOW), 1),
            other => return Err(ProviderError::Refused(format!("unknown method {other}"))),
        };
        let row = Model {
            payment_id: request.payment_id.to_string(),
            order_id: request.order_id.to_string(),
            currency: request.amount.currency().to_owned(),
            units: request.amount.units(),
            nanos: request.amount.nanos(),
            state: state.into(),
            change_at: now_ms,
            capture_at,
            webhooks,
            webhook_at: None,
            webhook_tries: 0,
        };
        let decided = self.call(Call::Charge(row)).await?.and_then(|row| outcome(&row));
        match (decided, request.method.as_str()) {
            (Some(decided), _) => decided,
            (None, "sim_slow_2s") => self.until_decided(&request.payment_id).await,
            (None, _) => Err(never_answered("it never answers this method").await),
        }
    }

    async fn status(&self, payment_id: &PaymentId) -> Result<ProviderStatus, ProviderError> {
        let Some(row) = self.call(Call::Status(payment_id.clone())).await? else {
            return Ok(ProviderStatus::NotFound);
        };
        Ok(match state(&row) {
            State::Captured => ProviderStatus::Captured { reference: reference(&row) },
            State::Declined => ProviderStatus::Declined { code: CODE.to_owned() },
            State::Cancelled => ProviderStatus::Cancelled,
            State::Refunded => ProviderStatus::Refunded,
            _ => ProviderStatus::Pending,
        })
    }

    async fn cancel(&self, payment_id: &PaymentId) -> Result<CancelOutcome, ProviderError> {
        let row = self.call(Call::Cancel(payment_id.clone())).await?;
        Ok(match row.as_ref().map(state) {
            Some(State::Captured | State::Refunded) => CancelOutcome::AlreadyCaptured,
            Some(State::Cancelled | State::Declined) => CancelOutcome::Cancelled,
            _ => CancelOutcome::Pending,
        })
    }

    async fn refund(&self, payment_id: &PaymentId, amount: &Money) -> Result<RefundOutcome, ProviderError> {
        let row = self.call(Call::Refund(payment_id.clone())).await?;
        match row {
            Some(row) if state(&row) == State::Refunded => {
                tracing::debug!(%payment_id, units = amount.units(), "the simulated provider gave money back");
                Ok(RefundOutcome::Refunded)
            }
            _ => Err(ProviderError::Refused("nothing was captured".to_owned())),
        }
    }

    fn verify_webhook(&self, body: &[u8], signature: &str, now_ms: i64) -> Result<WebhookEvent> {
        signature::verify(&self.secret, body, signature, now_ms / 1_000)
    }

    fn deliver_webhooks(&self, sink: WebhookSink, life: &Lifecycle) {
        let sim = self.clone();
        life.spawn_periodic("simulated provider", EVERY, move || {
            let (sim, sink) = (sim.clone(), sink.clone());
            async move {
                let round = async {
                    sim.capture_late_ones().await?;
                    sim.deliver(&sink).await
                };
                if let Err(error) = round.await {
                    tracing::warn!(%error, "the simulated provider is late");
                }
            }
        });
    }
}

/// Hangs for longer than any caller waits.
async fn never_answered(why: &str) -> ProviderError {
    tokio::time::sleep(HANGING).await;
    ProviderError::Unknown(why.to_owned())
}

/// Why `sim_decline` declines.
const CODE: &str = "card_declined";

/// Answers calls in one transaction: each with its row as it is after the call.
async fn answer(db: &sql::Database, calls: Vec<Call>, now_ms: i64) -> Result<Vec<Option<Model>>> {
    let calls = Arc::new(calls);
    let rows = transaction(db, |tx| {
        let calls = calls.clone();
        Box::pin(async move {
            // A row that is there decides; of two calls that would make one, the first.
            let mut new = BTreeMap::new();
            for call in calls.iter() {
                match call {
                    Call::Charge(row) => drop(new.entry(call.payment_id()).or_insert_with(|| row.clone())),
                    Call::Cancel(id) => drop(new.entry(call.payment_id()).or_insert_with(|| tombstone(id, now_ms))),
                    Call::Status(_) | Call::Refund(_) => {}
                }
            }
            if !new.is_empty() {
                let stays = OnConflict::column(Column::PaymentId).do_nothing_on([Column::PaymentId]).to_owned();
                let new: Vec<_> = new.into_values().map(whole).collect();
                for chunk in sql::chunks(&new) {
                    let insert = Entity::insert_many(chunk.to_vec()).on_conflict(stays.clone());
                    insert.exec_without_returning(tx).await?;
                }
            }
            let ids: BTreeSet<_> = calls.iter().map(Call::payment_id).collect();
            let mut rows = BTreeMap::new();
            for chunk in sql::key_chunks(&Vec::from_iter(ids)) {
                let wanted = Entity::find().filter(Column::PaymentId.is_in(chunk));
                for row in wanted.order_by_asc(Column::PaymentId).lock_exclusive().all(tx).await? {
                    rows.insert(row.payment_id.clone(), row);
                }
            }
            let (mut answers, mut changed) = (Vec::with_capacity(calls.len()), BTreeSet::new());
            for call in calls.iter() {
                let row = rows.get_mut(call.payment_id());
                let Some(row) = row else {
                    answers.push(None);
                    continue;
                };
                let next = match (call, state(row)) {
                    (Call::Cancel(_), State::Pending) => Some(State::Cancelled),
                    (Call::Refund(_), State::Captured) => Some(State::Refunded),
                    _ => None,
                };
                if let Some(next) = next {
                    row.state = next.into();
                    row.change_at = now_ms;
                    row.capture_at = None;
                    changed.insert(row.payment_id.clone());
                }
                answers.push(Some(row.clone()));
            }
            update(tx, rows.into_values().filter(|row| changed.contains(&row.payment_id)).collect()).await?;
            Ok(answers)
        })
    })
    .await?;
    Ok(rows)
}

/// Writes rows that are there and locked.
async fn update(tx: &DatabaseTransaction, rows: Vec<Model>) -> Result<(), DbErr> {
    let changes = OnConflict::column(Column::PaymentId)
        .update_columns([Column::State, Column::ChangeAt, Column::CaptureAt, Column::WebhookAt])
        .to_owned();
    let rows: Vec<_> = rows.into_iter().map(whole).collect();
    for chunk in sql::chunks(&rows) {
        let write = Entity::insert_many(chunk.to_vec()).on_conflict(changes.clone());
        write.exec_without_returning(tx).await?;
    }
    Ok(())
}

/// All columns, to be written.
fn whole(row: Model) -> books::ActiveModel {
    row.into_active_model().reset_all()
}

/// A payment that was cancelled before it was charged: whatever comes later is refused.
fn tombstone(payment_id: &PaymentId, now_ms: i64) -> Model {
    Model {
        payment_id: payment_id.to_string(),
        order_id: String::new(),
        currency: String::new(),
        units: 0,
        nanos: 0,
        state: State::Cancelled.into(),
        change_at: now_ms,
        capture_at: None,
        webhooks: 0,
        webhook_at: None,
        webhook_tries: 0,
    }
}

fn state(row: &Model) -> State {
    State::try_from(row.state).unwrap_or(State::Unspecified)
}

/// What a charge is answered with; `None` while it is not decided.
fn outcome(row: &Model) -> Option<Result<ProviderOutcome, ProviderError>> {
    Some(match state(row) {
        State::Captured => Ok(ProviderOutcome::Captured { reference: reference(row) }),
        State::Declined => Ok(ProviderOutcome::Declined { code: CODE.to_owned() }),
        State::Cancelled => Err(ProviderError::Refused("it was cancelled".to_owned())),
        State::Refunded => Err(ProviderError::Unknown("it was refunded".to_owned())),
        _ => return None,
    })
}

fn reference(row: &Model) -> String {
    format!("sim-{}", row.payment_id)
}

fn body(row: &Model) -> Result<Vec<u8>> {
    let time = timestamp(row.change_at);
    let kind = match state(row) {
        State::Refunded => "payment.refunded",
        _ => "payment.captured",
    };
    let order_id: OrderId = row.order_id.parse()?;
    let body = Body {
        r#type: kind.to_owned(),
        payment_id: row.payment_id.clone(),
        order_id: order_id.to_string(),
        amount: BodyAmount { currency_code: row.currency.clone(), units: row.units.to_string(), nanos: row.nanos },
        time: time.to_string(),
        decline_code: None,
    };
    serde_json::to_vec(&body).map_err(proto::Error::internal)
}
