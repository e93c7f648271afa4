//! How a role lives and dies: one soft stop, one hard stop, and every task tracked.
//!
//! - **Soft** ([`Lifecycle::stop`]): stop accepting, finish what is in flight. Loops watch [`Lifecycle::stopping`].
//! - **Hard**: after the grace, or on a second signal, whatever still runs is dropped where it awaits. Safe because
//!   every step is idempotent and recovery starts from the log.
//! - A task that must not end, ends: the whole process fails, rather than leaving a half-alive pod.
//!
//! No globals: two meshes fit in one process.

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFuture},
    task::TaskTracker,
};

/// One role's life. Cheap to clone; clones are the same life.
#[derive(Clone, Debug, Default)]
pub struct Lifecycle {
    soft: CancellationToken,
    hard: CancellationToken,
    tasks: TaskTracker,
    failure: Arc<Mutex<Option<String>>>,
    failed: CancellationToken,
}

impl Lifecycle {
    /// A life of its own.
    pub fn new() -> Self {
        Self::default()
    }

    /// A further life under this one: its own tasks and soft stop, but a failure of it is a failure of all, and the
    /// parent's hard stop reaches it.
    pub fn child(&self) -> Self {
        Self {
            soft: CancellationToken::new(),
            hard: self.hard.child_token(),
            tasks: TaskTracker::new(),
            failure: self.failure.clone(),
            failed: self.failed.clone(),
        }
    }

    /// Resolves when the soft stop is asked for.
    pub fn stopping(&self) -> WaitForCancellationFuture<'_> {
        self.soft.cancelled()
    }

    /// Whether the soft stop was asked for.
    pub fn is_stopping(&self) -> bool {
        self.soft.is_cancelled()
    }

    /// The soft stop's token, for what takes one.
    pub fn soft_token(&self) -> CancellationToken {
        self.soft.clone()
    }

    /// Where tasks are counted, for what spawns its own.
    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Runs a task that may end. The hard stop drops it where it awaits.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let hard = self.hard.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = hard.cancelled() => {}
                () = future => {}
            }
        });
    }

    /// Runs a task that must live as long as the role. Its end before a stop, or a panic, fails the process.
    pub fn spawn_essential(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        let life = self.clone();
        self.tasks.spawn(async move {
            let inner = tokio::spawn(future);
            let abort = inner.abort_handle();
            tokio::select! {
                biased;
                () = life.hard.cancelled() => abort.abort(),
                ended = inner => match ended {
                    Ok(()) if life.is_stopping() => {}
                    Ok(()) => life.fail(format!("{name} ended")),
                    Err(error) => life.fail(format!("{name} failed: {error}")),
                },
            }
        });
    }

    /// Runs `work` now and then: at once, and again `every` so often, until the soft stop. What it cannot do now it
    /// does next time.
    pub fn spawn_periodic<F, Fut>(&self, name: &'static str, every: Duration, mut work: F)
    where
        F: FnMut() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let soft = self.soft.clone();
        self.spawn_essential(name, async move {
            let mut ticks = tokio::time::interval(every);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    biased;
                    () = soft.cancelled() => return,
                    _ = ticks.tick() => work().await,
                }
            }
        });
    }

    /// Says that the process cannot go on.
    pub fn fail(&self, why: String) {
        tracing::error!(why, "a task that must not end has ended");
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.failed.cancel();
    }

    /// Resolves with the reason when a task that must not end has ended.
    pub async fn failed(&self) -> String {
        self.failed.cancelled().await;
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
    }

    /// Asks for the soft stop, waits up to `grace` for every task, then drops the rest. True when all ended in time.
    pub async fn stop(&self, grace: Duration) -> bool {
        self.soft.cancel();
        self.tasks.close();
        let in_time = tokio::time::timeout(grace, self.tasks.wait()).await.is_ok();
        if !in_time {
            self.kill();
            // Dropped futures end at their next await; give them that moment.
            let _ = tokio::time::timeout(Duration::from_secs(1), self.tasks.wait()).await;
        }
        in_time
    }

    /// The hard stop.
    pub fn kill(&self) {
        self.soft.cancel();
        self.hard.cancel();
    }
}

/// Resolves at the first SIGTERM or SIGINT.
pub async fn stop_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn stop_waits_for_tasks_and_then_no_longer() {
        let life = Lifecycle::new();
        let waits = life.clone();
        life.spawn(async move { waits.stopping().await });
        assert!(life.stop(Duration::from_secs(5)).await);

        let life = Lifecycle::new();
        life.spawn(std::future::pending());
        assert!(!life.stop(Duration::from_secs(5)).await);
        assert!(life.tasks.is_empty());
    }

    #[tokio::test]
    async fn an_essential_task_that_ends_fails_the_process() {
        let life = Lifecycle::new();
        life.child().spawn_essential("pump", async {});
        assert_eq!(life.failed().await, "pump ended");
    }
}
