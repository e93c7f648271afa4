//! payment-svc's settings.

use std::{path::PathBuf, sync::Arc, time::Duration};

use mesh::{clock::Clock, lifecycle::Lifecycle};
use sea_orm::DatabaseConnection;

use crate::provider::{
    Provider,
    sim::{SimConfig, SimProvider},
};

/// Who takes the money, and how long it may take.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "payment-options")]
pub struct Config {
    /// Who takes the money
    #[arg(long, env = "SECKILL_PROVIDER", value_enum, default_value_t = Config::default().provider)]
    pub provider: ProviderKind,

    /// How long a call to the provider may take. A charge that takes longer is answered as PENDING and asked for until
    /// its outcome is known
    #[arg(long, env = "SECKILL_PROVIDER_TIMEOUT", default_value = "1.5s", value_parser = mesh::duration::parse_positive, value_name = "DURATION")]
    pub provider_timeout: Duration,

    /// What the provider signs its webhooks with. Without it the simulated provider makes a secret of its own, and
    /// nobody else's webhooks are let in
    #[arg(long, env = "SECKILL_PROVIDER_WEBHOOK_SECRET", hide_env_values = true, value_name = "SECRET")]
    pub provider_webhook_secret: Option<String>,

    /// When the simulated provider captures a charge by sim_timeout, whose call it never answers
    #[arg(long, env = "SECKILL_SIM_LATE_CAPTURE", default_value = "3s", value_parser = mesh::duration::parse_positive, value_name = "DURATION")]
    pub sim_late_capture: Duration,

    /// While this file exists, the simulated provider is out of order: it does what it is asked to and answers nothing.
    /// To practise what to do about orders that are stuck
    #[arg(long, env = "SECKILL_SIM_SILENT_WHILE", value_name = "FILE")]
    pub sim_silent_while: Option<PathBuf>,
}

/// A payment provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProviderKind {
    /// The simulated one, with books of its own in payment-svc's database.
    Sim,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            provider: ProviderKind::Sim,
            provider_timeout: Duration::from_millis(1_500),
            provider_webhook_secret: None,
            sim_late_capture: Duration::from_secs(3),
            sim_silent_while: None,
        }
    }
}

impl Config {
    /// Makes the provider that the settings name. The simulated one keeps its books in `db`.
    pub fn provider(
        &self,
        db: DatabaseConnection,
        clock: Clock,
        life: &Lifecycle,
    ) -> anyhow::Result<Arc<dyn Provider>> {
        match self.provider {
            ProviderKind::Sim => {
                if self.provider_webhook_secret.as_deref().is_some_and(|s| s.len() < 16) {
                    anyhow::bail!("--provider-webhook-secret must have at least 16 characters");
                }
                let config = SimConfig {
                    late_capture: self.sim_late_capture,
                    webhook_secret: self.provider_webhook_secret.as_ref().map(|s| s.clone().into_bytes()),
                    silent_while: self.sim_silent_while.clone(),
                };
                Ok(Arc::new(SimProvider::start(db, clock, config, life)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        config: Config,
    }

    #[test]
    fn the_command_line_and_the_default_agree() {
        let parsed = Program::parse_from(["program"]).config;
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Config::default()));
    }
}
