//! The operator's verbs: look at sagas, help those that are stuck, and messages that nobody could use. And the book of
//! what operators did, wherever they did it.

use std::sync::Arc;

use proto::{
    Error, OrderId,
    error::Result,
    timestamp,
    v1::{
        AbandonSagaRequest, Action as WireAction, DeadLetter, ExplainSagaRequest, GetDeadLetterRequest, GetSagaRequest,
        ListActionsRequest, ListActionsResponse, ListDeadLettersRequest, ListDeadLettersResponse, ListSagasRequest,
        ListSagasResponse, RedriveDeadLetterRequest, RetrySagaRequest, Saga as WireSaga, SagaCourse, SagaEvent,
        SagaExplanation,
    },
};

use crate::{
    calls::Calls,
    engine::{
        self, Named, Saga,
        explain::{Course, explain},
        runner::{Change, Engine, Guard},
    },
    holdings::holdings,
    order_saga::{self, OrderSaga},
    refund_saga::{self, RefundSaga},
    store::{Action, Entry, Filter, Patch, Row, Verdict},
};

const DEFAULT_PAGE: i32 = 50;
const LARGEST_PAGE: i32 = 100;
/// Of an operator's reason.
const MAX_REASON: usize = 400;
/// As its column takes it.
const MAX_ACTION_ID: usize = 32;

/// What operators can do. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ops {
    calls: Calls,
    orders: Arc<Engine<OrderSaga>>,
}

impl Ops {
    /// On this engine and the refunds' under it.
    pub fn new(orders: Arc<Engine<OrderSaga>>) -> Self {
        Self { calls: orders.context().calls.clone(), orders }
    }

    /// A page of sagas, by id.
    pub async fn list(&self, request: ListSagasRequest) -> Result<ListSagasResponse> {
        let is_state = |name| order_saga::State::parse(name).is_some() || refund_saga::State::parse(name).is_some();
        if !request.state.is_empty() && !is_state(&request.state) {
            return Err(Error::invalid("state", "is no state of a saga"));
        }
        let size = page_size(request.page_size)?;
        let filter = if request.state.is_empty() { Filter::Stuck } else { Filter::State(request.state) };
        if !request.page_token.is_empty() && request.page_token.parse::<OrderId>().is_err() {
            return Err(Error::invalid("page_token", "is not one that was given out"));
        }
        // One more than asked for tells whether there is another page.
        let mut rows = self.calls.store.list(&filter, &request.page_token, size + 1).await?;
        let more = rows.len() as u64 > size;
        rows.truncate(size as usize);
        let next_page_token = rows.last().filter(|_| more).map(|row| row.saga_id.to_string()).unwrap_or_default();
        Ok(ListSagasResponse { sagas: rows.iter().map(|row| saga(row, &[])).collect(), next_page_token })
    }

    /// One saga with its history.
    pub async fn get(&self, request: &GetSagaRequest) -> Result<WireSaga> {
        let row = self.find(&request.saga).await?;
        let log = self.calls.store.log(row.saga_id).await?;
        check(&row, &log);
        Ok(saga(&row, &log))
    }

    /// What a retry or an abandon would do. Changes nothing.
    pub async fn explain(&self, request: &ExplainSagaRequest) -> Result<SagaExplanation> {
        let row = self.find(&request.saga).await?;
        if !row.stuck {
            return Err(not_stuck(&row));
        }
        if row.kind == RefundSaga::KIND {
            explanation(&self.orders.context().refunds, &row, refund_saga::Event::Abandoned)
        } else {
            explanation(&self.orders, &row, order_saga::Event::Abandoned)
        }
    }

    /// Puts a stuck saga back to work where it stood.
    pub async fn retry(&self, request: &RetrySagaRequest) -> Result<WireSaga> {
        let row = self.find(&request.saga).await?;
        if !self.calls.store.retry(row.saga_id, self.calls.clock.now_ms()).await? {
            return Err(not_stuck(&row));
        }
        tracing::info!(saga = %row.saga_id, state = row.state, "an operator puts a saga back to work");
        self.get(&GetSagaRequest { saga: request.saga.clone() }).await
    }

    /// Gives up on a stuck saga. Before the pivot it compensates; after it the operator owns what is left.
    pub async fn abandon(&self, request: &AbandonSagaRequest) -> Result<WireSaga> {
        let reason = request.reason.trim();
        if reason.is_empty() {
            return Err(Error::invalid("reason", "must be given"));
        }
        if reason.chars().count() > MAX_REASON {
            return Err(Error::invalid("reason", format!("must be at most {MAX_REASON} characters")));
        }
        let row = self.find(&request.saga).await?;
        let patch = Patch { detail: Some(format!("abandoned: {reason}")), ..Patch::default() };
        let verdict = if row.kind == RefundSaga::KIND {
            abandon(&self.orders.context().refunds, &row, refund_saga::Event::Abandoned, patch).await?
        } else {
            abandon(&self.orders, &row, order_saga::Event::Abandoned, patch).await?
        };
        if let Err(rejected) = verdict {
            let now = rejected.current.unwrap_or(row);
            // Never was, or another operator's retry or the attempt that succeeded was faster.
            if !now.stuck {
                return Err(not_stuck(&now));
            }
            let state = now.state;
            let message = format!("a saga in {state} cannot be abandoned: it goes on until it is done");
            return Err(Error::illegal_state(state, message));
        }
        tracing::warn!(saga = %row.saga_id, state = row.state, reason, "an operator abandons a saga");
        self.get(&GetSagaRequest { saga: request.saga.clone() }).await
    }

    /// A page of dead letters, oldest first.
    pub async fn dead_letters(&self, request: &ListDeadLettersRequest) -> Result<ListDeadLettersResponse> {
        let size = page_size(request.page_size)? as usize;
        let after = (!request.page_token.is_empty()).then_some(request.page_token.as_str());
        let mut letters = self.calls.bus.dead_letters(after, size + 1).await?;
        let more = letters.len() > size;
        letters.truncate(size);
        let next_page_token = letters.last().filter(|_| more).map(|letter| letter.id.clone()).unwrap_or_default();
        Ok(ListDeadLettersResponse { dead_letters: letters.into_iter().map(dead_letter).collect(), next_page_token })
    }

    /// One dead letter. Looked for page by page: there are few, or there is another problem.
    pub async fn dead_letter(&self, request: &GetDeadLetterRequest) -> Result<DeadLetter> {
        let id = letter_id(&request.dead_letter)?;
        let mut after: Option<String> = None;
        loop {
            let page = self.calls.bus.dead_letters(after.as_deref(), LARGEST_PAGE as usize).await?;
            after = page.last().map(|letter| letter.id.clone());
            if let Some(letter) = page.into_iter().find(|letter| letter.id == id) {
                return Ok(dead_letter(letter));
            }
            if after.is_none() {
                return Err(Error::not_found("dead letter"));
            }
        }
    }

    /// Publishes a dead letter again to where it came from, and forgets it.
    pub async fn redrive(&self, request: &RedriveDeadLetterRequest) -> Result<DeadLetter> {
        let id = letter_id(&request.dead_letter)?;
        let letter = self.calls.bus.redrive(id).await?.ok_or_else(|| Error::not_found("dead letter"))?;
        tracing::info!(id, "an operator redrives a dead letter");
        Ok(dead_letter(letter))
    }

    /// Writes down what an operator does; once more, how it ended.
    pub async fn record_action(&self, action: WireAction) -> Result<()> {
        let id = action.name.strip_prefix("actions/").unwrap_or(&action.name);
        if id.is_empty() || id.len() > MAX_ACTION_ID {
            return Err(Error::invalid("name", format!("must be 1 to {MAX_ACTION_ID} bytes")));
        }
        let time = action.time.ok_or_else(|| Error::invalid("time", "must be given"))?;
        let outcome = action.outcome();
        let action = Action {
            id: id.to_owned(),
            operator: action.operator,
            verb: action.verb,
            target: action.target,
            detail: action.detail,
            reason: action.reason,
            outcome,
            error: action.error,
            at: time.seconds * 1_000 + i64::from(time.nanos) / 1_000_000,
        };
        self.calls.store.record_action(action).await
    }

    /// A page of actions, newest first.
    pub async fn actions(&self, request: &ListActionsRequest) -> Result<ListActionsResponse> {
        let size = page_size(request.page_size)?;
        let before = (!request.page_token.is_empty()).then_some(request.page_token.as_str());
        let mut actions = self.calls.store.actions(before, &request.target, size + 1).await?;
        let more = actions.len() as u64 > size;
        actions.truncate(size as usize);
        let next_page_token = actions.last().filter(|_| more).map(|action| action.id.clone()).unwrap_or_default();
        Ok(ListActionsResponse { actions: actions.into_iter().map(wire_action).collect(), next_page_token })
    }

    async fn find(&self, name: &str) -> Result<Row> {
        let text = name.strip_prefix("sagas/").unwrap_or(name);
        if text.is_empty() {
            return Err(Error::invalid("saga", "must be given"));
        }
        let not_found = || Error::not_found("saga");
        let id: OrderId = text.parse().map_err(|_| not_found())?;
        self.calls.store.load(&[id]).await?.remove(&id).ok_or_else(not_found)
    }
}

async fn abandon<S: Saga>(engine: &Engine<S>, row: &Row, event: S::Event, patch: Patch) -> Result<Verdict> {
    let change = Change { saga_id: row.saga_id, event, patch, guard: Guard::Stuck(row.version), seen: None };
    let mut verdicts = engine.apply(vec![change]).await?;
    verdicts.pop().ok_or_else(|| Error::internal("no verdict"))
}

fn explanation<S: Saga>(engine: &Engine<S>, row: &Row, abandoned: S::Event) -> Result<SagaExplanation> {
    // A newer release's state: only that release can say.
    let state = S::State::parse(&row.state).ok_or_else(|| Error::internal("a saga's state is not one of ours"))?;
    let found = explain(engine.plan(), state, abandoned);
    Ok(SagaExplanation {
        saga: format!("sagas/{}", row.saga_id),
        state: row.state.clone(),
        past_pivot: found.past_pivot,
        retry: Some(course(found.retry)),
        abandon: found.abandon.map(course),
    })
}

fn course(course: Course) -> SagaCourse {
    SagaCourse {
        steps: course.steps.into_iter().map(str::to_owned).collect(),
        compensates: course.compensates,
        resulting_state: course.result.to_owned(),
    }
}

/// The log is the truth: a row that differs from it was changed by somebody else.
fn check(row: &Row, log: &[Entry]) {
    let replayed = if row.kind == RefundSaga::KIND {
        engine::replay::<RefundSaga>(log).map(|state| state.name())
    } else {
        engine::replay::<OrderSaga>(log).map(|state| state.name())
    };
    match replayed {
        Ok(state) if state == row.state => {}
        Ok(state) => {
            tracing::error!(saga = %row.saga_id, row = row.state, log = state, "a saga's row differs from its log")
        }
        Err(error) => tracing::error!(saga = %row.saga_id, %error, "a saga's log is broken"),
    }
}

fn letter_id(name: &str) -> Result<&str> {
    match name.strip_prefix("deadLetters/").unwrap_or(name) {
        "" => Err(Error::invalid("dead_letter", "must be given")),
        id => Ok(id),
    }
}

fn not_stuck(row: &Row) -> Error {
    Error::illegal_state(row.state.as_str(), "the saga is not stuck")
}

fn page_size(asked: i32) -> Result<u64> {
    match asked {
        0 => Ok(DEFAULT_PAGE.unsigned_abs().into()),
        size if size < 0 => Err(Error::invalid("page_size", "must not be negative")),
        size => Ok(size.min(LARGEST_PAGE).unsigned_abs().into()),
    }
}

fn saga(row: &Row, log: &[Entry]) -> WireSaga {
    WireSaga {
        name: format!("sagas/{}", row.saga_id),
        kind: row.kind.clone(),
        state: row.state.clone(),
        stuck: row.stuck,
        version: row.version,
        attempts: row.attempts,
        last_error: row.last_error.clone(),
        next_attempt_time: row.next_attempt_at.map(timestamp),
        create_time: Some(timestamp(row.create_at)),
        update_time: Some(timestamp(row.update_at)),
        history: log.iter().map(entry).collect(),
        order: row.order_id.name(),
        sale: row.sale_id.name(),
        buyer: row.buyer.to_string(),
        expire_time: Some(timestamp(row.expire_at)),
        holdings: Some(holdings(row)),
    }
}

fn entry(entry: &Entry) -> SagaEvent {
    let detail =
        if entry.detail.is_empty() { entry.event.clone() } else { format!("{}: {}", entry.event, entry.detail) };
    SagaEvent {
        version: entry.version,
        from: entry.from.clone(),
        to: entry.to.clone(),
        detail,
        time: Some(timestamp(entry.at)),
    }
}

fn wire_action(action: Action) -> WireAction {
    WireAction {
        name: format!("actions/{}", action.id),
        operator: action.operator,
        verb: action.verb,
        target: action.target,
        detail: action.detail,
        reason: action.reason,
        outcome: action.outcome.into(),
        error: action.error,
        time: Some(timestamp(action.at)),
    }
}

fn dead_letter(letter: mesh::bus::DeadLetter) -> DeadLetter {
    DeadLetter {
        name: format!("deadLetters/{}", letter.id),
        subject: letter.subject,
        message_id: letter.message_id,
        attempts: i32::try_from(letter.attempts).unwrap_or(i32::MAX),
        reason: letter.reason,
        payload: letter.payload,
        time: Some(timestamp(letter.at_ms)),
    }
}
