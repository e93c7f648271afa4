//! order-svc's settings.

/// How order records are read and written.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "order-options")]
pub struct Config {
    /// Calls whose order records share one transaction. More is faster under load and slower for the first of them.
    #[arg(long, env = "SECKILL_ORDER_BATCH_CALLS", default_value_t = Config::default().order_batch_calls)]
    pub order_batch_calls: usize,

    /// Transactions on order records that run at once. A second hides the database's round trip.
    #[arg(long, env = "SECKILL_ORDER_WRITERS", default_value_t = Config::default().order_writers)]
    pub order_writers: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { order_batch_calls: 16, order_writers: 2 }
    }
}
