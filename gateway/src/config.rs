//! The gateway's settings.

use std::time::Duration;

/// How much the gateway lets in, and for how long.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "gateway-options")]
pub struct Config {
    /// Public calls in progress at once. One more is refused with OVERLOADED at once and has taken nothing. Health and
    /// reflection do not count
    #[arg(long, env = "SECKILL_MAX_IN_FLIGHT", default_value_t = Config::default().max_in_flight, value_name = "CALLS")]
    pub max_in_flight: usize,

    /// How long a public call may take before it is answered with DEADLINE_EXCEEDED. A reader's own `wait` is added;
    /// event streams last as long as they like
    #[arg(long, env = "SECKILL_REQUEST_TIMEOUT", default_value = "10s", value_parser = mesh::duration::parse_positive, value_name = "DURATION")]
    pub request_timeout: Duration,

    /// Event streams and long polls at once, of orders and of sales each. One more is refused with OVERLOADED
    #[arg(long, env = "SECKILL_MAX_WATCHERS", default_value_t = Config::default().max_watchers, value_name = "WATCHERS")]
    pub max_watchers: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_in_flight: 20_000, request_timeout: Duration::from_secs(10), max_watchers: 100_000 }
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

    #[test]
    fn timeouts_that_refuse_everything_are_refused() {
        let parse =
            |text| Program::try_parse_from(["program", "--request-timeout", text]).map(|p| p.config.request_timeout);
        assert_eq!(parse("0.5s").unwrap(), Duration::from_millis(500));
        for bad in ["0s", "-1s", "soon", "10"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
