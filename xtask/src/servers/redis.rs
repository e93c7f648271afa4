//! Redis without persistence: permits are rebuilt from the ledger, and losing them is a case that is meant to be met.

use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use super::{Durability, Kind, Server, probe};
use crate::process::{Interrupt, daemon_command, stdout_of, which};

pub struct Redis {
    server: PathBuf,
}

impl Redis {
    pub fn find() -> Option<Self> {
        which("redis-server").map(|server| Self { server })
    }
}

impl Server for Redis {
    fn kind(&self) -> Kind {
        Kind::Redis
    }

    fn version(&self) -> String {
        stdout_of(Command::new(&self.server).arg("--version")).unwrap_or_default()
    }

    fn prepare(&self, _home: &Path, _interrupt: &Interrupt) -> Result<()> {
        Ok(())
    }

    fn command(&self, home: &Path, port: u16, _durability: Durability) -> Command {
        let mut command = daemon_command(&self.server, self.stop_with());
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--daemonize", "no"]);
        command.args(["--save", "", "--appendonly", "no"]).arg("--dir").arg(home);
        command
    }

    fn is_ready(&self, port: u16) -> bool {
        probe(port, |stream| {
            stream.write_all(b"PING\r\n")?;
            let mut answer = [0; 5];
            stream.read_exact(&mut answer)?;
            Ok(&answer == b"+PONG")
        })
    }

    fn url(&self, port: u16) -> String {
        format!("redis://127.0.0.1:{port}")
    }
}
