//! Real SQL on paused time.
//!
//! sqlx works on threads of its own, and whoever waits for one on a paused clock sees the clock run on. So a call of a
//! store is made [`at_once`]: polled to its end within one poll of its caller, on the clock and the tasks of another
//! runtime. To the caller it is one indivisible step that takes no time.

use std::{
    cell::Cell,
    fmt,
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
};

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

impl<F> fmt::Debug for Back<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Back").finish_non_exhaustive()
    }
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
