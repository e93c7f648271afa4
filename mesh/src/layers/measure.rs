//! Metrics of calls: `seckill_rpc_total{side,method,code}` and `seckill_rpc_seconds{side,method}`.
//!
//! Handles are looked up once per method and kept, since looking one up by its labels costs more than counting.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock, PoisonError, RwLock},
    time::Duration,
};

use metrics::{Counter, Histogram};
use tonic::Code;

/// Callers choose the paths that they call, so their number is bounded: beyond it all are `other`.
const MAX_METHODS: usize = 256;

/// Which end of the call is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// As the caller sees it.
    Client,
    /// As the handler's side sees it.
    Server,
}

impl Side {
    fn label(self) -> &'static str {
        match self {
            Side::Client => "client",
            Side::Server => "server",
        }
    }
}

/// The methods of one stack.
#[derive(Debug)]
pub(super) struct Methods {
    pub(super) side: Side,
    known: RwLock<HashMap<Box<str>, Arc<Method>>>,
    other: Method,
}

#[derive(Debug)]
struct Method {
    side: Side,
    name: String,
    seconds: Histogram,
    codes: [OnceLock<Counter>; 17],
}

impl Methods {
    pub(super) fn new(side: Side) -> Arc<Self> {
        // A handle made before there is a recorder would count nothing for ever.
        crate::telemetry::prometheus();
        metrics::describe_counter!("seckill_rpc_total", "calls answered, by side, method and gRPC code");
        metrics::describe_histogram!("seckill_rpc_seconds", "time until a call's answer began, in seconds");
        Arc::new(Self { side, known: RwLock::default(), other: Method::new(side, "other") })
    }

    /// Counts one call to `path`.
    pub(super) fn record(&self, path: &str, code: Code, took: Duration) {
        if let Some(method) = self.known.read().unwrap_or_else(PoisonError::into_inner).get(path) {
            return method.record(code, took);
        }
        // Nobody's method: a caller that makes names up must not use up the table.
        if code == Code::Unimplemented {
            return self.other.record(code, took);
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() < MAX_METHODS {
            let made = || Arc::new(Method::new(self.side, path.trim_start_matches('/')));
            known.entry(path.into()).or_insert_with(made).record(code, took);
        } else {
            self.other.record(code, took);
        }
    }
}

impl Method {
    fn new(side: Side, name: &str) -> Self {
        Self {
            side,
            name: name.to_owned(),
            seconds: metrics::histogram!("seckill_rpc_seconds", "side" => side.label(), "method" => name.to_owned()),
            codes: Default::default(),
        }
    }

    fn record(&self, code: Code, took: Duration) {
        self.seconds.record(took.as_secs_f64());
        let counter = self.codes[code as usize].get_or_init(|| {
            metrics::counter!(
                "seckill_rpc_total",
                "side" => self.side.label(),
                "method" => self.name.clone(),
                "code" => proto::error::code_name(code),
            )
        });
        counter.increment(1);
    }
}
