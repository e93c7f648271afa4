//! The book of what operators do. Every verb of theirs that changes something is served here: written down before it is
//! done, and once more how it ended. What cannot be written down is not done.

use mesh::{chance, clock::Clock, identity::Identity, link::Link};
use proto::{
    Error, OrderId, Reason,
    internal::coordinator_client::CoordinatorClient,
    timestamp,
    v1::{Action, action::Outcome},
};
use tonic::{Request, Response, Status};

use super::{Callers, answer, given, handed_on, plain};

/// Keeps the book, which is with the coordinator. Cheap to clone.
#[derive(Clone)]
pub struct Actions {
    callers: Callers,
    coordinator: CoordinatorClient<Link>,
    clock: Clock,
}

/// What an operator wants to do.
pub struct Deed {
    verb: &'static str,
    target: String,
    detail: String,
    reason: String,
}

impl Deed {
    /// This rpc, to a sale. However its name was spelled, it becomes the id, and the book has one name for it.
    pub fn to_sale(verb: &'static str, sale: &mut String, reason: &str) -> Result<Self, Error> {
        *sale = super::sale(sale)?;
        Self::new(verb, format!("sales/{sale}"), reason)
    }

    /// This rpc, to a saga, in the same way. What is no id is no saga's.
    pub fn to_saga(verb: &'static str, saga: &mut String, reason: &str) -> Result<Self, Error> {
        given("saga", saga)?;
        let id = OrderId::parse("saga", saga.strip_prefix("sagas/").unwrap_or(saga));
        *saga = id.map_err(|_| Error::not_found("saga"))?.to_string();
        Self::new(verb, format!("sagas/{saga}"), reason)
    }

    /// This rpc, to a dead letter.
    pub fn to_dead_letter(verb: &'static str, letter: &str, reason: &str) -> Result<Self, Error> {
        given("dead_letter", letter)?;
        let id = letter.strip_prefix("deadLetters/").unwrap_or(letter);
        Self::new(verb, format!("deadLetters/{id}"), reason)
    }

    fn new(verb: &'static str, target: String, reason: &str) -> Result<Self, Error> {
        plain("reason", reason)?;
        Ok(Self { verb, target, detail: String::new(), reason: reason.to_owned() })
    }

    /// With what else was asked for.
    pub fn with(self, detail: String) -> Self {
        Self { detail, ..self }
    }
}

impl Actions {
    /// Over this link.
    pub fn new(callers: Callers, coordinator: Link, clock: Clock) -> Self {
        Self { callers, coordinator: CoordinatorClient::new(coordinator), clock }
    }

    /// Serves a verb: an operator's request is checked and named by `deed`, then handed on by `call`, on the record.
    pub async fn operate<Q, A, F>(
        &self,
        request: Request<Q>,
        deed: impl FnOnce(&mut Q) -> Result<Deed, Error>,
        call: impl FnOnce(Q) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let done = async {
            let operator = self.callers.operator(request.metadata())?;
            let mut request = request.into_inner();
            let deed = deed(&mut request)?;
            self.record(&operator, deed, async { handed_on(call(request).await) }).await
        };
        answer(done.await)
    }

    async fn record<T>(
        &self,
        operator: &Identity,
        deed: Deed,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let Deed { verb, target, detail, reason } = deed;
        let now_ms = self.clock.now_ms();
        let mut action = Action {
            // In the order of ids is in the order of time.
            name: format!("actions/{now_ms:012x}{:016x}", chance::between(0, u64::MAX)),
            operator: operator.subject.to_string(),
            verb: verb.to_owned(),
            target,
            detail,
            reason,
            outcome: Outcome::Begun.into(),
            error: String::new(),
            time: Some(timestamp(now_ms)),
        };
        self.write(&action).await?;
        let done = work.await;
        let (outcome, error) = ended(&done);
        action.set_outcome(outcome);
        action.error = error;
        tracing::info!(operator = action.operator, verb, target = action.target, ?outcome, "an operator's action");
        if let Err(error) = self.write(&action).await {
            // It stays BEGUN, which says no more than is known there.
            tracing::warn!(%error, action = action.name, "how an operator's action ended could not be recorded");
        }
        done
    }

    async fn write(&self, action: &Action) -> Result<(), Error> {
        handed_on(self.coordinator.clone().record_action(action.clone()).await)
    }
}

/// A call that failed may have had its effect all the same, and so may one that goes on; one that was answered with a no
/// has not.
fn ended<T>(done: &Result<T, Error>) -> (Outcome, String) {
    let Err(error) = done else { return (Outcome::Done, String::new()) };
    let goes_on = matches!(error.reason, Reason::DeadlineExceeded | Reason::Overloaded | Reason::StockRebuilding);
    let is_no = error.reason.is_answer() && !goes_on;
    (if is_no { Outcome::Refused } else { Outcome::Begun }, error.reason.as_str_name().to_owned())
}
