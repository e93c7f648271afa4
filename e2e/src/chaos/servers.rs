//! The servers' keeper: whoever started PostgreSQL, Redis and NATS kills and restarts them for us.
//!
//! `cargo xtask chaos` listens on a Unix socket: a line is a verb and a server (`kill redis`), the answer a line, `ok`
//! or what went wrong, once it is done. `start` is done when the server answers its own protocol.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

/// A server that can be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// PostgreSQL or MariaDB.
    Database,
    /// Redis.
    Redis,
    /// NATS.
    Nats,
}

impl Server {
    /// All of them.
    pub const ALL: [Server; 3] = [Server::Database, Server::Redis, Server::Nats];
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Server::Database => "database",
            Server::Redis => "redis",
            Server::Nats => "nats",
        })
    }
}

/// The way to whoever keeps the servers.
#[derive(Clone, Debug)]
pub struct Keeper(PathBuf);

impl Keeper {
    /// The keeper who listens here.
    pub fn at(socket: &Path) -> Self {
        Self(socket.to_owned())
    }

    /// SIGKILL. Done when it is gone.
    pub async fn kill(&self, server: Server) -> Result<()> {
        self.ask("kill", server).await
    }

    /// Starts a dead server on its port and data; answers how long it took to answer.
    pub async fn start(&self, server: Server) -> Result<Duration> {
        let started = Instant::now();
        self.ask("start", server).await?;
        Ok(started.elapsed())
    }

    async fn ask(&self, verb: &str, server: Server) -> Result<()> {
        let talk = async {
            let mut stream = UnixStream::connect(&self.0).await?;
            stream.write_all(format!("{verb} {server}\n").as_bytes()).await?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        match talk.await.context("asking for the servers' keeper")?.trim() {
            "ok" => Ok(()),
            other => bail!("{verb} {server}: {other}"),
        }
    }
}
