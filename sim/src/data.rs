//! Real SQL in a run that holds time still.
//!
//! sqlx works on threads of its own, and whoever waits for one on a paused clock sees the clock run on. So a call of a
//! store is made [`at_once`]: polled to its end within one poll of its caller, on the clock and the tasks of another
//! runtime. To the run it is one indivisible step that takes no time.

use std::{
    cell::Cell,
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
};

use anyhow::Context as _;
use migrations::Service;
use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use tokio::runtime::{Handle, Runtime};

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Runs a future that waits for other threads, and for nothing of this runtime, to its end.
pub fn at_once<F: Future>(future: F) -> F::Output {
    let _clock = elsewhere().enter();
    DEPTH.set(DEPTH.get() + 1);
    // Its polls must not use up the caller's turn: how many there are is a matter of threads.
    let mut future = pin!(tokio::task::unconstrained(future));
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => {
                DEPTH.set(DEPTH.get() - 1);
                return output;
            }
            Poll::Pending => std::thread::park(),
        }
    }
}

/// Whether this is within a step that may not wait.
pub fn within_a_step() -> bool {
    DEPTH.get() > 0
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Where drivers run what they run in the background.
fn elsewhere() -> &'static Handle {
    static ELSEWHERE: OnceLock<Runtime> = OnceLock::new();
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).thread_name("drivers").enable_all().build().expect("a thread can be started")
    };
    ELSEWHERE.get_or_init(runtime).handle()
}

/// What a store calls back within a step, on the run's own clock again.
pub struct Back<F> {
    run: Handle,
    future: Pin<Box<F>>,
}

impl<F> Back<F> {
    /// To the runtime `run`.
    pub fn to(run: Handle, future: F) -> Self {
        Self { run, future: Box::pin(future) }
    }
}

impl<F: Future> Future for Back<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let run = self.run.clone();
        let _clock = run.enter();
        self.future.as_mut().poll(context)
    }
}

/// The services' databases: they outlive every crash of a role.
#[derive(Debug)]
pub struct Databases {
    pub stock: DatabaseConnection,
    pub order: DatabaseConnection,
    pub payment: DatabaseConnection,
    pub coordinator: DatabaseConnection,
}

impl Databases {
    /// Empty ones, in memory.
    pub fn open() -> anyhow::Result<Self> {
        Ok(Self {
            stock: open(Service::Stock)?,
            order: open(Service::Order)?,
            payment: open(Service::Payment)?,
            coordinator: open(Service::Coordinator)?,
        })
    }
}

impl Drop for Databases {
    /// Their threads end with the run, and not some time later.
    fn drop(&mut self) {
        for db in [&self.stock, &self.order, &self.payment, &self.coordinator] {
            // They are in memory: whatever is lost with them is lost anyway.
            let _ = at_once(db.close_by_ref());
        }
    }
}

/// Migrating takes a while; what it comes to is kept.
fn open(service: Service) -> anyhow::Result<DatabaseConnection> {
    static SCHEMAS: [OnceLock<String>; 4] = [const { OnceLock::new() }; 4];
    at_once(async {
        let db = mesh::sql::connect("sqlite::memory:").await?;
        let kept = &SCHEMAS[service as usize];
        if let Some(schema) = kept.get() {
            db.execute_unprepared(schema).await?;
            return Ok(db);
        }
        migrations::up(service, &db).await?;
        let written = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'";
        let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), written)).await?;
        let mut schema = String::new();
        for row in rows {
            schema.push_str(&row.try_get::<String>("", "sql")?);
            schema.push_str(";\n");
        }
        // Two threads may have migrated at the same time, to the same.
        let _ = kept.set(schema);
        anyhow::Ok(db)
    })
    .with_context(|| format!("the database of {}", service.name()))
}
