//! A saga's plan: its steps in order, each with its action and its compensation, or the word that says it has none.
//!
//! The pivot parts the plan. Before it every step must say how it is compensated; after it no step can: the builder
//! that [`Before::pivot`] answers has no such method. A compensation's retries cannot be limited, for the same reason.
//!
//! ```text
//!   Plan::builder(policy)
//!       .step("lock").action(lock).compensation("release", release)
//!       .pivot("charge").action(charge)
//!       .forward("deduct").action(deduct)
//!       .build()
//! ```

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use proto::Error;
use tokio::time::{Instant, timeout};

use super::Saga;
use crate::store::{Patch, Row};

/// What a step came to, for one saga.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome<E> {
    /// Its effect is there, now or since before. What it found out is recorded with the next transition.
    Done(Patch),
    /// The answer is no, for good, and this is what it means for the saga.
    Refused(E, Patch),
    /// Under way: ask again.
    InProgress,
    /// Nobody knows: ask again. Nothing is compensated on it.
    Unknown(Error),
}

/// One outcome per row, in order.
pub type Outcomes<S> = Vec<Outcome<<S as Saga>::Event>>;

type Running<S> = Pin<Box<dyn Future<Output = Outcomes<S>> + Send>>;

/// What an action or a compensation does: a batch in, its outcomes out.
pub type Run<S> = Arc<dyn Fn(Arc<<S as Saga>::Context>, Vec<Row>) -> Running<S> + Send + Sync>;

/// When a step that did not come to an end is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The first delay; it doubles from there.
    pub base: Duration,
    /// The longest delay.
    pub cap: Duration,
    /// After this many attempts the saga is stuck.
    pub attempts: i32,
    /// Whether a stuck saga is tried all the same. What may pass by itself (a fault, work in progress) always is.
    pub goes_on: bool,
}

impl Retry {
    /// The same, without giving up.
    pub fn for_ever(self) -> Self {
        Self { goes_on: true, ..self }
    }

    /// The delay after so many attempts.
    pub fn delay(&self, attempts: i32) -> Duration {
        let doublings = attempts.saturating_sub(1).clamp(0, 20) as u32;
        self.base.saturating_mul(1 << doublings).min(self.cap)
    }
}

/// What steps get that do not ask for something else.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// See [`Retry`].
    pub retry: Retry,
    /// An action that takes longer has an unknown outcome.
    pub timeout: Duration,
}

impl Policy {
    fn for_ever(self) -> Self {
        Self { retry: self.retry.for_ever(), ..self }
    }
}

/// Something to be done to a batch of sagas: an action or a compensation.
pub struct Deed<S: Saga> {
    /// Label of metrics, spans and logs.
    pub name: &'static str,
    /// When to try again.
    pub retry: Retry,
    timeout: Duration,
    run: Run<S>,
}

impl<S: Saga> Deed<S> {
    fn new<F, Fut>(name: &'static str, policy: Policy, run: F) -> Self
    where
        F: Fn(Arc<S::Context>, Vec<Row>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Outcomes<S>> + Send + 'static,
    {
        let run: Run<S> = Arc::new(move |context, rows| Box::pin(run(context, rows)));
        Self { name, retry: policy.retry, timeout: policy.timeout, run }
    }

    /// Does it. One outcome per row, in order; all unknown when it took too long. For no rows nobody is called.
    pub async fn run(&self, context: &Arc<S::Context>, rows: &[Row]) -> Outcomes<S> {
        self.run_until(Instant::now() + self.timeout, context, rows).await
    }

    /// The same, and it took too long when it is not done by then either.
    pub async fn run_until(&self, until: Instant, context: &Arc<S::Context>, rows: &[Row]) -> Outcomes<S> {
        if rows.is_empty() {
            return Vec::new();
        }
        let span = tracing::info_span!("step", saga = S::KIND, step = self.name, items = rows.len());
        for row in rows {
            mesh::telemetry::link(&span, &row.traceparent);
        }
        let running = tracing::Instrument::instrument((self.run)(context.clone(), rows.to_vec()), span);
        let allowed = self.timeout.min(until.saturating_duration_since(Instant::now()));
        match timeout(allowed, running).await {
            Ok(outcomes) if outcomes.len() == rows.len() => outcomes,
            Ok(outcomes) => {
                let error = Error::internal(format!("{} outcomes for {} sagas", outcomes.len(), rows.len()));
                vec![Outcome::Unknown(error); rows.len()]
            }
            Err(_) => {
                let error = Error::dependency("a service", format!("{} took over {allowed:.1?}", self.name));
                vec![Outcome::Unknown(error); rows.len()]
            }
        }
    }
}

impl<S: Saga> fmt::Debug for Deed<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A step: what it does, and what undoes it.
#[derive(Debug)]
pub struct Step<S: Saga> {
    /// Going forward.
    pub action: Deed<S>,
    /// Going back; only before the pivot.
    pub compensation: Option<Deed<S>>,
}

/// A saga's steps in order. See the module.
#[derive(Debug)]
pub struct Plan<S: Saga> {
    steps: Vec<Step<S>>,
    pivot: usize,
}

impl<S: Saga> Plan<S> {
    /// An empty plan whose steps get this policy.
    pub fn builder(policy: Policy) -> Before<S> {
        Before { steps: Vec::new(), policy }
    }

    /// The action of the step with this name. Panics when the plan has none: a state's work names a step that is not
    /// there, which the first test of any kind of saga finds.
    pub fn action(&self, name: &str) -> &Deed<S> {
        let step = self.steps.iter().find(|s| s.action.name == name);
        &step.unwrap_or_else(|| panic!("the plan of {} has no step {name}", S::KIND)).action
    }

    /// The compensations, last step first.
    pub fn compensations(&self) -> impl Iterator<Item = &Deed<S>> {
        self.steps[..self.pivot].iter().rev().filter_map(|s| s.compensation.as_ref())
    }

    /// Every action and every compensation.
    pub fn deeds(&self) -> impl Iterator<Item = &Deed<S>> {
        self.steps.iter().map(|s| &s.action).chain(self.compensations())
    }

    /// The same plan with something around every action and compensation, each told by its name: this is where a proof
    /// makes them fail, stop and happen twice.
    pub fn around(mut self, wrap: impl Fn(&'static str, Run<S>) -> Run<S>) -> Self {
        for step in &mut self.steps {
            for deed in step.compensation.iter_mut().chain([&mut step.action]) {
                deed.run = wrap(deed.name, deed.run.clone());
            }
        }
        self
    }

    /// The names of the steps in order, the pivot's index among them.
    pub fn outline(&self) -> (Vec<&'static str>, usize) {
        (self.steps.iter().map(|s| s.action.name).collect(), self.pivot)
    }
}

/// A plan before its pivot.
#[derive(Debug)]
pub struct Before<S: Saga> {
    steps: Vec<Step<S>>,
    policy: Policy,
}

impl<S: Saga> Before<S> {
    /// The next step that can still be undone.
    pub fn step(self, name: &'static str) -> Idle<S, Undoable> {
        Idle { steps: self.steps, policy: self.policy, name, stage: Undoable }
    }

    /// The step that decides: before it we compensate, after it we only go forward. Unknown outcomes of it are asked
    /// about for ever, since nothing else may be done.
    pub fn pivot(self, name: &'static str) -> Idle<S, Final> {
        let stage = Final { pivot: self.steps.len(), policy: self.policy };
        Idle { steps: self.steps, policy: self.policy.for_ever(), name, stage }
    }
}

/// A step before the pivot must say what undoes it.
#[derive(Debug)]
pub struct Undoable;

/// The pivot and every step after it cannot be undone.
#[derive(Debug)]
pub struct Final {
    pivot: usize,
    policy: Policy,
}

/// A step that has no action yet.
#[derive(Debug)]
pub struct Idle<S: Saga, Stage> {
    steps: Vec<Step<S>>,
    policy: Policy,
    name: &'static str,
    stage: Stage,
}

impl<S: Saga, Stage> Idle<S, Stage> {
    /// What the step does. Must be idempotent: it runs again whenever its outcome was not recorded.
    pub fn action<F, Fut>(self, run: F) -> Acting<S, Stage>
    where
        F: Fn(Arc<S::Context>, Vec<Row>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Outcomes<S>> + Send + 'static,
    {
        let action = Deed::new(self.name, self.policy, run);
        Acting { steps: self.steps, policy: self.policy, action, stage: self.stage }
    }
}

/// A step that has its action.
#[derive(Debug)]
pub struct Acting<S: Saga, Stage> {
    steps: Vec<Step<S>>,
    policy: Policy,
    action: Deed<S>,
    stage: Stage,
}

impl<S: Saga, Stage> Acting<S, Stage> {
    /// How long one attempt may take.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.action.timeout = timeout;
        self
    }

    /// Asks for ever; after the policy's attempts the saga is reported as stuck all the same.
    pub fn for_ever(mut self) -> Self {
        self.action.retry = self.action.retry.for_ever();
        self
    }
}

impl<S: Saga> Acting<S, Undoable> {
    /// What undoes it. Must be idempotent, and do nothing where the step never ran. Retried for ever.
    pub fn compensation<F, Fut>(mut self, name: &'static str, run: F) -> Before<S>
    where
        F: Fn(Arc<S::Context>, Vec<Row>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Outcomes<S>> + Send + 'static,
    {
        let compensation = Some(Deed::new(name, self.policy.for_ever(), run));
        self.steps.push(Step { action: self.action, compensation });
        Before { steps: self.steps, policy: self.policy }
    }
}

impl<S: Saga> Acting<S, Final> {
    /// The next step of the only way that is left.
    pub fn forward(mut self, name: &'static str) -> Idle<S, Final> {
        self.steps.push(Step { action: self.action, compensation: None });
        Idle { steps: self.steps, policy: self.stage.policy, name, stage: self.stage }
    }

    /// The plan.
    pub fn build(mut self) -> Plan<S> {
        self.steps.push(Step { action: self.action, compensation: None });
        Plan { steps: self.steps, pivot: self.stage.pivot }
    }
}
