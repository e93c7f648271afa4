//! Operators' verbs, spoken at a running mesh's door: the gateway's public API, as a table for people or as its JSON.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    time::Duration,
};

use anyhow::Context;
use clap::{Args, ValueEnum};
use mesh::identity::{AuthArgs, Secret};
use proto::v1::operations_client::OperationsClient;
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::tools;

pub mod actions;
pub mod dead_letter;
pub mod saga;
pub mod stock;

/// Entries asked for at once.
const PAGE: i32 = 100;

/// Which mesh, who asks, and how the answer is printed.
#[derive(Args, Clone, Debug)]
pub struct DoorArgs {
    /// The gateway.
    #[arg(long, global = true, env = "SECKILL_GATEWAY", default_value = "http://127.0.0.1:8080", value_name = "URL")]
    pub gateway: http::Uri,
    /// Print a table, or the API's JSON.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// A token with the scope operator. Without one the key below mints it.
    #[arg(long, global = true, env = "SECKILL_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Whom a minted token names.
    #[arg(long, global = true, env = "SECKILL_OPERATOR", default_value = "seckill-cli", value_name = "NAME")]
    pub operator: String,
    /// Where embedded backends keep their files, the signing key among them.
    #[arg(long, global = true, env = "SECKILL_DATA_DIR", default_value = "./seckill-data", value_name = "DIR")]
    pub data_dir: std::path::PathBuf,
    /// The key that tokens are signed with; the data dir's where none is given.
    #[arg(long, global = true, env = "SECKILL_AUTH_HS256_SECRET", hide_env_values = true, value_name = "SECRET")]
    pub auth_hs256_secret: Option<Secret>,
    /// The issuer (`iss`) of a minted token, where the gateway demands one.
    #[arg(long, global = true, env = "SECKILL_AUTH_ISSUER", value_name = "ISSUER")]
    pub auth_issuer: Option<String>,
    /// Whom a minted token is for (`aud`), where the gateway demands it.
    #[arg(long, global = true, env = "SECKILL_AUTH_AUDIENCE", value_name = "AUDIENCE")]
    pub auth_audience: Option<String>,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// As the HTTP API answers, on one line.
    Json,
}

impl Output {
    /// Prints an answer; `name` is its message's in the API.
    fn print<M: prost::Message>(self, name: &str, answer: &M, table: impl FnOnce(&M) -> String) -> anyhow::Result<()> {
        let text = match self {
            Output::Table => table(answer),
            Output::Json => String::from_utf8(gateway::json::print(name, answer)?).context("JSON is text")?,
        };
        match writeln!(io::stdout(), "{}", text.trim_end()) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.context("printing the answer"),
        }
    }
}

/// A gateway that takes us for an operator.
type Door = InterceptedService<Channel, Bearer>;

/// Adds the token to every call.
#[derive(Clone, Debug)]
pub struct Bearer(AsciiMetadataValue);

impl Bearer {
    /// For this token.
    pub fn new(token: &str) -> anyhow::Result<Self> {
        Ok(Self(format!("Bearer {token}").parse().context("the token is not a header's value")?))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

impl DoorArgs {
    /// What a token is minted by, as the gateway demands it.
    fn auth(&self) -> AuthArgs {
        AuthArgs {
            auth_hs256_secret: self.auth_hs256_secret.clone(),
            auth_jwks: None,
            auth_issuer: self.auth_issuer.clone(),
            auth_audience: self.auth_audience.clone(),
        }
    }

    async fn open(&self) -> anyhow::Result<Door> {
        let token = match &self.token {
            Some(token) => token.clone(),
            None => {
                let minter = tools::minter(&self.auth(), &self.data_dir)?;
                tools::mint(&minter, &self.operator, "operator", Duration::from_secs(60))?
            }
        };
        let bearer = Bearer::new(&token)?;
        let channel = Endpoint::from(self.gateway.clone())
            .connect()
            .await
            .with_context(|| format!("no gateway at {}", self.gateway))?;
        Ok(InterceptedService::new(channel, bearer))
    }

    async fn operations(&self) -> anyhow::Result<OperationsClient<Door>> {
        Ok(OperationsClient::new(self.open().await?))
    }
}

/// Asks for page after page until there is no next one, or there are enough.
async fn pages<T>(
    enough: usize,
    mut page: impl AsyncFnMut(String) -> Result<(Vec<T>, String), Status>,
) -> Result<Vec<T>, Status> {
    let (mut all, mut token) = (Vec::new(), String::new());
    loop {
        let (found, next) = page(token).await?;
        all.extend(found);
        if next.is_empty() || all.len() >= enough {
            all.truncate(enough);
            return Ok(all);
        }
        token = next;
    }
}

/// Tells a refusal, which is an answer: false.
fn told(outcome: anyhow::Result<()>) -> anyhow::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(error) => match error.downcast::<Status>() {
            Ok(status) => {
                eprintln!("{}: {}", proto::error::code_name(status.code()), status.message());
                Ok(false)
            }
            Err(error) => Err(error),
        },
    }
}

/// Lines up columns under their heads, a row a line whatever is in it. The last may be as long as it likes.
fn table<const N: usize>(heads: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let plain = |row: [String; N]| row.map(|cell| cell.replace(char::is_control, " "));
    let rows: Vec<[String; N]> = std::iter::once(heads.map(str::to_owned)).chain(rows).map(plain).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // Writing to a String cannot fail.
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn time(time: Option<&prost_types::Timestamp>) -> String {
    time.map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Verb {
        #[command(flatten)]
        door: DoorArgs,
    }

    /// A gateway that takes only tokens of one issuer, for one audience, takes the verbs' own.
    #[tokio::test]
    async fn a_minted_token_is_as_the_gateway_demands_it() {
        let demanded = "--auth-hs256-secret=0123456789abcdef0123456789abcdef --auth-issuer=shop --auth-audience=mesh";
        let auth = |flags: &str| Verb::parse_from(std::iter::once("verb").chain(flags.split(' '))).door.auth();
        let verifier = auth(demanded).load().unwrap().verifier(mesh::clock::Clock::system()).await.unwrap();
        let minted = |flags: &str| {
            let minter = tools::minter(&auth(flags), std::path::Path::new("")).unwrap();
            format!("Bearer {}", tools::mint(&minter, "olga", "operator", Duration::from_secs(60)).unwrap())
        };
        assert!(verifier.verify(&minted(demanded)).is_ok());
        assert!(verifier.verify(&minted(demanded.rsplit_once(' ').unwrap().0)).is_err(), "without an audience");
    }

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let rows = [["a".to_owned(), "b c".to_owned()], ["longer".to_owned(), String::new()]];
        assert_eq!(table(["id", "error"], rows), "id      error\na       b c\nlonger\n");
        assert_eq!(table(["id"], []), "id\n");
        assert_eq!(table(["error"], [["two\nlines".to_owned()]]), "error\ntwo lines\n");
    }
}
