//! `seckill saga …`: an operator's view of sagas, and help for those that are stuck, through the gateway's public API.

use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use mesh::identity::{AuthArgs, Secret};
use proto::v1::{
    AbandonSagaRequest, ExplainSagaRequest, GetSagaRequest, ListSagasRequest, RetrySagaRequest, Saga, SagaCourse,
    SagaExplanation, operations_client::OperationsClient,
};
use tonic::{Request, metadata::AsciiMetadataValue};

use crate::tools;

/// Options of `seckill saga`.
#[derive(Args, Clone, Debug)]
pub struct SagaArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: SagaVerb,
    /// The gateway.
    #[arg(long, global = true, env = "SECKILL_GATEWAY", default_value = "http://127.0.0.1:8080", value_name = "URL")]
    pub gateway: http::Uri,
    /// Where embedded backends keep their files, the signing key among them.
    #[arg(long, global = true, env = "SECKILL_DATA_DIR", default_value = "./seckill-data", value_name = "DIR")]
    pub data_dir: std::path::PathBuf,
    /// The key that tokens are signed with; the data dir's where none is given.
    #[arg(long, global = true, env = "SECKILL_AUTH_HS256_SECRET", hide_env_values = true, value_name = "SECRET")]
    pub auth_hs256_secret: Option<Secret>,
}

/// What can be done with sagas.
#[derive(Subcommand, Clone, Debug)]
pub enum SagaVerb {
    /// List stuck sagas, or those in a state.
    List {
        /// Only sagas in this state.
        #[arg(long, default_value = "")]
        state: String,
    },
    /// Show one saga with its history.
    Show {
        /// Its id; an order saga's is its order's.
        saga: String,
    },
    /// Tell what a retry or an abandon would do to a stuck saga, without doing it.
    Explain {
        /// Its id.
        saga: String,
    },
    /// Put a stuck saga back to work.
    Retry {
        /// Its id.
        saga: String,
    },
    /// Give a stuck saga up.
    Abandon {
        /// Its id.
        saga: String,
        /// Why; it is recorded.
        #[arg(long)]
        reason: String,
    },
}

/// Runs the verb. False when the gateway refused it.
pub async fn run(args: SagaArgs) -> anyhow::Result<bool> {
    let auth = AuthArgs { auth_hs256_secret: args.auth_hs256_secret, ..Default::default() };
    let minter = tools::minter(&auth, &args.data_dir)?;
    let token = tools::mint(&minter, "seckill-cli", "operator", Duration::from_secs(60))?;
    let bearer = format!("Bearer {token}");
    let bearer: AsciiMetadataValue = bearer.parse().context("the token is not a header value")?;
    let channel = tonic::transport::Endpoint::from(args.gateway.clone())
        .connect()
        .await
        .with_context(|| format!("no gateway at {}", args.gateway))?;
    let mut operations = OperationsClient::with_interceptor(channel, move |mut request: Request<()>| {
        request.metadata_mut().insert("authorization", bearer.clone());
        Ok(request)
    });
    let answer = match args.verb {
        SagaVerb::List { state } => list(&mut operations, state).await,
        SagaVerb::Show { saga } => operations.get_saga(GetSagaRequest { saga }).await.map(|s| show(s.get_ref())),
        SagaVerb::Explain { saga } => {
            operations.explain_saga(ExplainSagaRequest { saga }).await.map(|e| explain(e.get_ref()))
        }
        SagaVerb::Retry { saga } => operations.retry_saga(RetrySagaRequest { saga }).await.map(|s| show(s.get_ref())),
        SagaVerb::Abandon { saga, reason } => {
            operations.abandon_saga(AbandonSagaRequest { saga, reason }).await.map(|s| show(s.get_ref()))
        }
    };
    match answer {
        Ok(()) => Ok(true),
        Err(status) => {
            eprintln!("{}: {}", proto::error::code_name(status.code()), status.message());
            Ok(false)
        }
    }
}

async fn list<T>(operations: &mut OperationsClient<T>, state: String) -> Result<(), tonic::Status>
where
    T: tonic::client::GrpcService<tonic::body::Body>,
    T::Error: Into<tonic::codegen::StdError>,
    T::ResponseBody: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    <T::ResponseBody as http_body::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    println!("{:<38} {:<12} {:<18} {:>8} {:>8}  last error", "saga", "kind", "state", "version", "attempts");
    let mut page_token = String::new();
    loop {
        let request = ListSagasRequest { page_size: 100, page_token, state: state.clone() };
        let page = operations.list_sagas(request).await?.into_inner();
        for saga in &page.sagas {
            let id = saga.name.trim_start_matches("sagas/");
            let Saga { kind, state, version, attempts, last_error, .. } = saga;
            println!("{id:<38} {kind:<12} {state:<18} {version:>8} {attempts:>8}  {last_error}");
        }
        if page.next_page_token.is_empty() {
            return Ok(());
        }
        page_token = page.next_page_token;
    }
}

fn show(saga: &Saga) {
    println!("{}  {}  {}{}", saga.name, saga.kind, saga.state, if saga.stuck { "  STUCK" } else { "" });
    println!("version {}, {} attempts at this step", saga.version, saga.attempts);
    if !saga.last_error.is_empty() {
        println!("last error: {}", saga.last_error);
    }
    for event in &saga.history {
        let time = event.time.as_ref().map(ToString::to_string).unwrap_or_default();
        println!("  {:>3}  {time:<28} {:>18} -> {:<18} {}", event.version, event.from, event.to, event.detail);
    }
}

fn explain(explanation: &SagaExplanation) {
    let pivot = if explanation.past_pivot { "past the pivot: only forward" } else { "not past the pivot" };
    println!("{}  {}  {pivot}", explanation.saga, explanation.state);
    println!("retry    {}", explanation.retry.as_ref().map_or_else(|| "is refused".to_owned(), course));
    println!("abandon  {}", explanation.abandon.as_ref().map_or_else(|| "is refused".to_owned(), course));
    println!("Nothing was done. A step that finds something else when it runs leads elsewhere.");
}

fn course(course: &SagaCourse) -> String {
    let SagaCourse { steps, compensates, resulting_state } = course;
    match (steps.as_slice(), compensates) {
        ([], _) => format!("does nothing more; the saga ends in {resulting_state} and an operator owns what is left"),
        (steps, false) => format!("does {}; then {resulting_state}", steps.join(", ")),
        (steps, true) => format!("gives back by {}; then {resulting_state}", steps.join(", ")),
    }
}
