//! stock-svc's settings.

use std::time::Duration;

/// How patient the loops are.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "stock-options")]
pub struct Config {
    /// How old a grant must be before it is given back when no order came of it. Longer than any purchase takes from
    /// permit to stream
    #[arg(long, env = "SECKILL_GRANT_GRACE", default_value = "10s", value_parser = mesh::duration::parse_positive, value_name = "DURATION")]
    pub grant_grace: Duration,

    /// After how long a rebuild warns that the orders accepted before it are not locked yet. It goes on waiting: every
    /// accepted order keeps its unit
    #[arg(long, env = "SECKILL_REBUILD_DRAIN_TIMEOUT", default_value = "30s", value_parser = mesh::duration::parse_positive, value_name = "DURATION")]
    pub rebuild_drain_timeout: Duration,

    /// How long another process may rebuild before this one takes over
    #[arg(long, env = "SECKILL_REBUILD_TAKEOVER", default_value = "10s", value_parser = mesh::duration::parse_positive, value_name = "DURATION")]
    pub rebuild_takeover: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grant_grace: Duration::from_secs(10),
            rebuild_drain_timeout: Duration::from_secs(30),
            rebuild_takeover: Duration::from_secs(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn flags_and_default_agree() {
        #[derive(Parser)]
        struct Cli {
            #[command(flatten)]
            config: Config,
        }
        let parsed = Cli::parse_from(["stock"]).config;
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Config::default()));
        assert!(Cli::try_parse_from(["stock", "--grant-grace", "0s"]).is_err());
    }
}
