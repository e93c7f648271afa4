//! The coordinator's settings. Durations are in milliseconds.

use std::time::Duration;

use crate::engine::{
    plan::{Policy, Retry},
    runner::Limits,
};

/// How sagas are driven.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Coordinator")]
// Every role's struct has this name, and groups of one command must not.
#[group(id = "coordinator-options")]
pub struct Config {
    /// Orders changed or read in one call or transaction, at most.
    #[arg(long, env = "SECKILL_SAGA_BATCH", default_value_t = Config::default().saga_batch)]
    pub saga_batch: usize,

    /// Calls in flight at once that change or read orders. More hide round trips, fewer make larger batches, which cost
    /// less for each order.
    #[arg(long, env = "SECKILL_SAGA_CALLS", default_value_t = Config::default().saga_calls)]
    pub saga_calls: usize,

    /// Accepted orders that may wait for the funnel. Whoever comes while it is full waits, too, for a second at most.
    #[arg(long, env = "SECKILL_ACCEPT_BACKLOG", default_value_t = Config::default().accept_backlog)]
    pub accept_backlog: usize,

    /// Accepted orders that the funnel locks in one go.
    #[arg(long, env = "SECKILL_FUNNEL_BATCH", default_value_t = Config::default().funnel_batch)]
    pub funnel_batch: usize,

    /// Batches that the funnel works on at once. Another is begun beside one that is half full at once, beside a smaller one
    /// after 30 milliseconds: in a rush they overlap, and when it is quieter fewer and larger ones cost less. None where other
    /// replicas are to lock what this one accepts.
    #[arg(long, env = "SECKILL_FUNNEL_WORKERS", default_value_t = Config::default().funnel_workers)]
    pub funnel_workers: usize,

    /// First delay in milliseconds before a batch that could not be locked is tried again; doubles up to 32 times it.
    #[arg(long, env = "SECKILL_FUNNEL_RETRY_MS", default_value_t = Config::default().funnel_retry_ms)]
    pub funnel_retry_ms: u64,

    /// Deadlines that a lane works on in one go.
    #[arg(long, env = "SECKILL_LANE_BATCH", default_value_t = Config::default().lane_batch)]
    pub lane_batch: usize,

    /// After how many milliseconds a message that a dead coordinator had taken is given to another. Longer than a batch
    /// takes; work that is done twice is only wasted.
    #[arg(long, env = "SECKILL_ACK_WAIT_MS", default_value_t = Config::default().ack_wait_ms)]
    pub ack_wait_ms: u64,

    /// Unpaid orders that wait in a lane's head at once. Unbounded, a broker collapses under a million of them.
    #[arg(long, env = "SECKILL_LANE_PENDING", default_value_t = Config::default().lane_pending)]
    pub lane_pending: usize,

    /// How often in milliseconds lanes that others opened are looked for.
    #[arg(long, env = "SECKILL_LANE_REFRESH_MS", default_value_t = Config::default().lane_refresh_ms)]
    pub lane_refresh_ms: u64,

    /// How often in milliseconds the database is swept for deadlines that no lane has seen.
    #[arg(long, env = "SECKILL_DEADLINE_SWEEP_MS", default_value_t = Config::default().deadline_sweep_ms)]
    pub deadline_sweep_ms: u64,

    /// How far in milliseconds a deadline must have passed before the sweep takes it: the lane's head start.
    #[arg(long, env = "SECKILL_DEADLINE_GRACE_MS", default_value_t = Config::default().deadline_grace_ms)]
    pub deadline_grace_ms: i64,

    /// Deadlines that the sweep takes in one go.
    #[arg(long, env = "SECKILL_DEADLINE_SWEEP_BATCH", default_value_t = Config::default().deadline_sweep_batch)]
    pub deadline_sweep_batch: u64,

    /// How long in milliseconds a charge may take before its outcome counts as unknown and the buyer is told PAYING.
    #[arg(long, env = "SECKILL_CHARGE_TIMEOUT_MS", default_value_t = Config::default().charge_timeout_ms)]
    pub charge_timeout_ms: u64,

    /// Calls of charges in flight at once. Many, so that a slow one holds up nobody else's.
    #[arg(long, env = "SECKILL_CHARGE_CALLS", default_value_t = Config::default().charge_calls)]
    pub charge_calls: usize,

    /// How long in milliseconds an announced payment is left to the buyer's own call, which is quicker.
    #[arg(long, env = "SECKILL_SETTLE_GRACE_MS", default_value_t = Config::default().settle_grace_ms)]
    pub settle_grace_ms: i64,

    /// How often in milliseconds sagas are looked for that nobody works on.
    #[arg(long, env = "SECKILL_SAGA_RECOVERY_MS", default_value_t = Config::default().saga_recovery_ms)]
    pub saga_recovery_ms: u64,

    /// Sagas that are taken up in one go.
    #[arg(long, env = "SECKILL_SAGA_RECOVERY_BATCH", default_value_t = Config::default().saga_recovery_batch)]
    pub saga_recovery_batch: u64,

    /// For how long in milliseconds whoever works on a saga is alone with it. A dead coordinator's are taken up after.
    #[arg(long, env = "SECKILL_SAGA_LEASE_MS", default_value_t = Config::default().saga_lease_ms)]
    pub saga_lease_ms: u64,

    /// How long in milliseconds one step of a batch may take. All steps of a state together take four fifths of the lease at
    /// most.
    #[arg(long, env = "SECKILL_SAGA_STEP_TIMEOUT_MS", default_value_t = Config::default().saga_step_timeout_ms)]
    pub saga_step_timeout_ms: u64,

    /// First delay in milliseconds before a failed step is tried again; doubles.
    #[arg(long, env = "SECKILL_SAGA_RETRY_MS", default_value_t = Config::default().saga_retry_ms)]
    pub saga_retry_ms: u64,

    /// Longest delay in milliseconds before a failed step is tried again.
    #[arg(long, env = "SECKILL_SAGA_RETRY_CAP_MS", default_value_t = Config::default().saga_retry_cap_ms)]
    pub saga_retry_cap_ms: u64,

    /// Attempts after which a saga is reported as stuck. What may pass by itself, compensations and the charge are tried
    /// on all the same; any other step that is refused waits for an operator.
    #[arg(long, env = "SECKILL_SAGA_ATTEMPTS", default_value_t = Config::default().saga_attempts)]
    pub saga_attempts: i32,

    /// Batches of sagas going forward at once.
    #[arg(long, env = "SECKILL_SAGA_FORWARD", default_value_t = Config::default().saga_forward)]
    pub saga_forward: usize,

    /// Batches of compensations at once, apart from those going forward.
    #[arg(long, env = "SECKILL_SAGA_COMPENSATIONS", default_value_t = Config::default().saga_compensations)]
    pub saga_compensations: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            saga_batch: 512,
            saga_calls: 1,
            accept_backlog: 2_048,
            funnel_batch: 512,
            funnel_workers: 2,
            funnel_retry_ms: 100,
            lane_batch: 512,
            ack_wait_ms: 3_000,
            lane_pending: 10_000,
            lane_refresh_ms: 3_000,
            deadline_sweep_ms: 250,
            deadline_grace_ms: 300,
            deadline_sweep_batch: 1_024,
            charge_timeout_ms: 3_000,
            charge_calls: 64,
            settle_grace_ms: 1_000,
            saga_recovery_ms: 500,
            saga_recovery_batch: 512,
            saga_lease_ms: 5_000,
            saga_step_timeout_ms: 10_000,
            saga_retry_ms: 100,
            saga_retry_cap_ms: 10_000,
            saga_attempts: 200,
            saga_forward: 16,
            saga_compensations: 4,
        }
    }
}

impl Config {
    /// What steps get that do not ask for something else.
    pub fn policy(&self) -> Policy {
        let ms = Duration::from_millis;
        let retry = Retry {
            base: ms(self.saga_retry_ms),
            cap: ms(self.saga_retry_cap_ms),
            attempts: self.saga_attempts,
            goes_on: false,
        };
        Policy { retry, timeout: ms(self.saga_step_timeout_ms) }
    }

    /// How much at once.
    pub fn limits(&self) -> Limits {
        Limits {
            lease: Duration::from_millis(self.saga_lease_ms),
            forward: self.saga_forward,
            compensations: self.saga_compensations,
            recovery_batch: self.saga_recovery_batch,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        config: Config,
    }

    #[test]
    fn no_flags_are_the_defaults_and_flags_win() {
        let defaults = Program::parse_from(["program"]).config;
        assert_eq!(format!("{defaults:?}"), format!("{:?}", Config::default()));
        let config = Program::parse_from(["program", "--saga-lease-ms", "7"]).config;
        assert_eq!(config.limits().lease, Duration::from_millis(7));
    }
}
