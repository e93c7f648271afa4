//! The command line: every option a flag and an environment variable; flags win.

use std::{collections::HashMap, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use mesh::{identity::AuthArgs, telemetry::TelemetryArgs};

/// Flash sales that never oversell: five gRPC services with a saga coordinator, in one binary.
///
/// Without a command it runs all five in this process. With no backend named it is complete on this machine: SQLite
/// for stores and streams, permits in memory. Every option is also an environment variable; flags win.
#[derive(Parser, Debug)]
#[command(name = "seckill", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of `up`, the default command.
    #[command(flatten)]
    pub up: Box<UpArgs>,
}

/// The verbs.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run all five roles in this process (the default).
    Up(Box<UpArgs>),
    /// Run the gateway: the only door, HTTP and gRPC on one port.
    Gateway(Box<RoleArgs<gateway::Config>>),
    /// Run the coordinator: accepts orders and drives their sagas.
    Coordinator(Box<RoleArgs<coordinator::Config>>),
    /// Run order-svc: the buyer-facing order record.
    Order(Box<RoleArgs<order_svc::Config>>),
    /// Run stock-svc: sales, ledger and permits. With a verb: look at a sale's stock, or rebuild its permits.
    Stock(Box<StockArgs>),
    /// Run payment-svc: charges and refunds.
    Payment(Box<RoleArgs<payment_svc::Config>>),
    /// Hold a sale: a rush of buyers through the real gateway, the outcome, the audit.
    Demo(Box<crate::demo::DemoArgs>),
    /// Check I1 to I7 from the databases, the permits and the streams. Reads only; exits 1 where one is broken.
    Audit(AuditArgs),
    /// Mint a token for a buyer or an operator.
    Token(TokenArgs),
    /// Apply migrations, or show which are applied.
    Migrate(MigrateArgs),
    /// Look at sagas and help those that are stuck.
    Saga(crate::ops::saga::SagaArgs),
    /// Look at messages that nobody could use, and give them another try.
    DeadLetter(crate::ops::dead_letter::DeadLetterArgs),
    /// List what operators did: who, when, to what, why, and how it ended.
    Actions(crate::ops::actions::ActionsArgs),
}

/// Where state lives. With nothing given everything is embedded.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Backends")]
pub struct StorageArgs {
    /// Where embedded backends keep their files.
    #[arg(long, env = "SECKILL_DATA_DIR", default_value = "./seckill-data", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Database of every service that has none of its own: postgres://, mysql:// or sqlite://.
    #[arg(long, env = "SECKILL_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// Database of stock-svc.
    #[arg(long, env = "SECKILL_STOCK_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub stock_database_url: Option<String>,
    /// Database of order-svc.
    #[arg(long, env = "SECKILL_ORDER_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub order_database_url: Option<String>,
    /// Database of payment-svc.
    #[arg(long, env = "SECKILL_PAYMENT_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub payment_database_url: Option<String>,
    /// Database of the coordinator.
    #[arg(long, env = "SECKILL_COORDINATOR_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub coordinator_database_url: Option<String>,
    /// Redis for permits; in process when not given.
    #[arg(long, env = "SECKILL_REDIS_URL", value_name = "URL", hide_env_values = true)]
    pub redis_url: Option<String>,
    /// NATS with JetStream for streams and signals; SQLite when not given.
    #[arg(long, env = "SECKILL_NATS_URL", value_name = "URL", hide_env_values = true)]
    pub nats_url: Option<String>,
}

impl Default for StorageArgs {
    fn default() -> Self {
        Self {
            data_dir: "./seckill-data".into(),
            database_url: None,
            stock_database_url: None,
            order_database_url: None,
            payment_database_url: None,
            coordinator_database_url: None,
            redis_url: None,
            nats_url: None,
        }
    }
}

impl StorageArgs {
    /// The database of one service: its own, the common one, or a file in the data dir.
    pub fn database(&self, service: migrations::Service) -> String {
        let own = match service {
            migrations::Service::Stock => &self.stock_database_url,
            migrations::Service::Order => &self.order_database_url,
            migrations::Service::Payment => &self.payment_database_url,
            migrations::Service::Coordinator => &self.coordinator_database_url,
        };
        own.as_ref()
            .or(self.database_url.as_ref())
            .cloned()
            .unwrap_or_else(|| format!("sqlite://{}/{}.db", self.data_dir.display(), service.name()))
    }

    /// Whether every backend is embedded. Anything else is a deployment, and a deployment needs a key of its own.
    pub fn is_embedded(&self) -> bool {
        self.redis_url.is_none()
            && self.nats_url.is_none()
            && migrations::Service::ALL.iter().all(|&s| self.database(s).starts_with("sqlite:"))
    }
}

/// What every process has.
#[derive(Args, Clone, Debug)]
pub struct CommonArgs {
    /// Backends.
    #[command(flatten)]
    pub storage: StorageArgs,
    /// Keys of tokens.
    #[command(flatten)]
    pub auth: AuthArgs,
    /// Logs, traces and metrics.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
    /// Where /metrics, /livez, /readyz and /version are served.
    #[arg(long, env = "SECKILL_ADMIN_LISTEN", default_value = "127.0.0.1:9090", value_name = "ADDR")]
    pub admin_listen: SocketAddr,
    /// How long a stop waits for what is in flight.
    #[arg(long, env = "SECKILL_SHUTDOWN_GRACE", default_value = "20s", value_name = "DURATION", value_parser = mesh::duration::parse)]
    pub shutdown_grace: Duration,
    /// Apply pending migrations at start. On by default; turn off where a job of yours does it.
    #[arg(long, env = "SECKILL_MIGRATE", default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub migrate: bool,
}

impl CommonArgs {
    /// Everything else as it is by default.
    pub fn for_storage(storage: StorageArgs) -> Self {
        Self {
            storage,
            auth: AuthArgs::default(),
            telemetry: TelemetryArgs::default(),
            admin_listen: ([127, 0, 0, 1], 9090).into(),
            shutdown_grace: Duration::from_secs(20),
            migrate: true,
        }
    }
}

/// Options of `seckill up`.
#[derive(Args, Clone, Debug)]
pub struct UpArgs {
    /// What every process has.
    #[command(flatten)]
    pub common: CommonArgs,
    /// The gateway's address: HTTP, public gRPC, health and reflection.
    #[arg(long, env = "SECKILL_LISTEN", default_value = "127.0.0.1:8080", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// The roles' own options.
    #[command(flatten)]
    pub roles: RoleConfigs,
}

/// The five roles' own options.
#[derive(Args, Clone, Debug, Default)]
pub struct RoleConfigs {
    /// The gateway's.
    #[command(flatten, next_help_heading = "Gateway")]
    pub gateway: gateway::Config,
    /// The coordinator's.
    #[command(flatten, next_help_heading = "Coordinator")]
    pub coordinator: coordinator::Config,
    /// order-svc's.
    #[command(flatten, next_help_heading = "Orders")]
    pub order: order_svc::Config,
    /// stock-svc's.
    #[command(flatten, next_help_heading = "Stock")]
    pub stock: stock_svc::Config,
    /// payment-svc's.
    #[command(flatten, next_help_heading = "Payments")]
    pub payment: payment_svc::Config,
}

/// Options of one role in a process of its own.
#[derive(Args, Clone, Debug)]
pub struct RoleArgs<C: Args> {
    /// What every process has.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Where this role serves.
    #[arg(long, env = "SECKILL_LISTEN", default_value = "127.0.0.1:8080", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// The roles that this one calls.
    #[command(flatten)]
    pub endpoints: EndpointArgs,
    /// The role's own options.
    #[command(flatten)]
    pub role: C,
}

/// The role, or an operator's verb about what it keeps.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct StockArgs {
    /// Without one the role runs.
    #[command(subcommand)]
    pub verb: Option<crate::ops::stock::StockVerb>,
    /// The role's options.
    #[command(flatten)]
    pub role: RoleArgs<stock_svc::Config>,
}

/// Where the other roles are. Several addresses of one role are balanced.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Endpoints")]
pub struct EndpointArgs {
    /// stock-svc.
    #[arg(long, env = "SECKILL_STOCK_ENDPOINTS", value_delimiter = ',', value_name = "URL,…")]
    pub stock_endpoints: Vec<http::Uri>,
    /// order-svc.
    #[arg(long, env = "SECKILL_ORDER_ENDPOINTS", value_delimiter = ',', value_name = "URL,…")]
    pub order_endpoints: Vec<http::Uri>,
    /// payment-svc.
    #[arg(long, env = "SECKILL_PAYMENT_ENDPOINTS", value_delimiter = ',', value_name = "URL,…")]
    pub payment_endpoints: Vec<http::Uri>,
    /// The coordinator.
    #[arg(long, env = "SECKILL_COORDINATOR_ENDPOINTS", value_delimiter = ',', value_name = "URL,…")]
    pub coordinator_endpoints: Vec<http::Uri>,
}

/// Options of `seckill audit`.
#[derive(Args, Clone, Debug)]
pub struct AuditArgs {
    /// Backends.
    #[command(flatten)]
    pub storage: StorageArgs,
    /// The system is at rest: every order must be terminal and every permit back.
    #[arg(long)]
    pub at_rest: bool,
}

/// Options of `seckill token`.
#[derive(Args, Clone, Debug)]
pub struct TokenArgs {
    /// The subject: the buyer's id.
    #[arg(long)]
    pub sub: String,
    /// What the token may do: buyer, operator or both.
    #[arg(long, default_value = "buyer", value_delimiter = ' ', num_args = 1..)]
    pub scope: Vec<String>,
    /// How long it is good.
    #[arg(long, default_value = "1h", value_parser = mesh::duration::parse)]
    pub ttl: Duration,
    /// Where embedded backends keep their files, the signing key among them.
    #[arg(long, env = "SECKILL_DATA_DIR", default_value = "./seckill-data", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Keys of tokens.
    #[command(flatten)]
    pub auth: AuthArgs,
}

/// Options of `seckill migrate`.
#[derive(Args, Clone, Debug)]
pub struct MigrateArgs {
    /// Apply what is pending, or show what is applied.
    #[arg(value_enum)]
    pub action: MigrateAction,
    /// Backends.
    #[command(flatten)]
    pub storage: StorageArgs,
}

/// What `seckill migrate` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum MigrateAction {
    /// Apply what is pending.
    Up,
    /// Show what is applied.
    Status,
}

/// Parses the command line. `cargo xtask up` leaves the addresses and keys of its mesh in `target/up.env`; the verbs
/// that talk to a running mesh take them as defaults, below flags and environment, unless told otherwise.
pub fn parse() -> Cli {
    let arguments: Vec<String> = std::env::args().collect();
    let file = if wants_running_mesh(&arguments) { read_env_file("target/up.env") } else { HashMap::new() };
    let command = with_defaults(<Cli as clap::CommandFactory>::command(), &file);
    match <Cli as clap::FromArgMatches>::from_arg_matches(&command.get_matches()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    }
}

fn wants_running_mesh(arguments: &[String]) -> bool {
    let has = |flag: &str| arguments.iter().any(|a| a == flag || a.starts_with(&format!("{flag}=")));
    match arguments.get(1).map(String::as_str) {
        Some("demo") => has("--gateway"),
        Some("stock") => matches!(arguments.get(2).map(String::as_str), Some("report" | "reconcile" | "rebuild")),
        Some("audit" | "token" | "saga" | "dead-letter" | "actions") => !has("--data-dir") && !has("--database-url"),
        _ => false,
    }
}

fn read_env_file(path: &str) -> HashMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.trim().trim_start_matches("export ").split_once('='))
        .map(|(key, value)| (key.to_owned(), value.trim_matches(['"', '\'']).to_owned()))
        .collect()
}

fn with_defaults(command: clap::Command, file: &HashMap<String, String>) -> clap::Command {
    let with_file = |arg: clap::Arg| {
        let value = arg.get_env().and_then(|name| file.get(name.to_str()?)).cloned();
        match value {
            Some(value) => arg.default_value(value),
            None => arg,
        }
    };
    command.mut_args(with_file).mut_subcommands(|sub| with_defaults(sub, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn stock_alone_is_the_role_and_with_a_verb_an_operators() {
        let stock = |words: &[&str]| match Cli::try_parse_from(words).map(|cli| cli.command) {
            Ok(Some(Command::Stock(args))) => args,
            other => panic!("{words:?}: {other:?}"),
        };
        let role = stock(&["seckill", "stock", "--redis-url", "redis://host"]);
        assert!(role.verb.is_none());
        assert_eq!(role.role.common.storage.redis_url.as_deref(), Some("redis://host"));
        let rebuild = stock(&["seckill", "stock", "rebuild", "spring", "--reason", "lost", "--output", "json"]);
        assert!(matches!(rebuild.verb, Some(crate::ops::stock::StockVerb::Rebuild { sale, .. }) if sale == "spring"));
    }

    #[test]
    fn a_service_without_its_own_url_takes_the_common_one_and_then_a_file() {
        let mut storage = StorageArgs { data_dir: "/d".into(), ..Default::default() };
        assert_eq!(storage.database(migrations::Service::Stock), "sqlite:///d/stock.db");
        assert!(storage.is_embedded());
        storage.database_url = Some("postgres://all".into());
        storage.stock_database_url = Some("postgres://stock".into());
        assert_eq!(storage.database(migrations::Service::Stock), "postgres://stock");
        assert_eq!(storage.database(migrations::Service::Order), "postgres://all");
        assert!(!storage.is_embedded());
    }
}
