//! MariaDB, run from its own binaries and from no configuration but what is here.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::unistd::User;

use super::{Durability, Kind, Server, account, give_to, run_as};
use crate::process::{Interrupt, daemon_command, run_quietly, stdout_of, which};

/// The user with all rights, and its password. Fixed: the server is reachable from this machine only.
const USER: &str = "seckill";

pub struct MariaDb {
    server: PathBuf,
    install_db: PathBuf,
    admin: PathBuf,
    client: PathBuf,
    user: Option<User>,
}

impl MariaDb {
    pub fn find() -> Result<Option<Self>> {
        let programs = ["mariadbd", "mariadb-install-db", "mariadb-admin", "mariadb"].map(which);
        let [Some(server), Some(install_db), Some(admin), Some(client)] = programs else { return Ok(None) };
        Ok(Some(Self { server, install_db, admin, client, user: account("mysql")? }))
    }

    fn client(&self, program: &Path, port: u16) -> Command {
        let mut command = Command::new(program);
        command.args(["--no-defaults", "--protocol=TCP", "--host=127.0.0.1", &format!("--port={port}")]);
        command.args([format!("--user={USER}"), format!("--password={USER}")]).stdin(Stdio::null());
        command
    }
}

impl Server for MariaDb {
    fn kind(&self) -> Kind {
        Kind::MariaDb
    }

    fn version(&self) -> String {
        stdout_of(Command::new(&self.server).args(["--no-defaults", "--version"])).unwrap_or_default()
    }

    fn prepare(&self, home: &Path, interrupt: &Interrupt) -> Result<()> {
        give_to(self.user.as_ref(), home)?;
        // Run at every start before the first client is served, hence repeatable.
        let init = format!(
            "CREATE USER IF NOT EXISTS '{USER}'@'127.0.0.1' IDENTIFIED BY '{USER}';\n\
             GRANT ALL PRIVILEGES ON *.* TO '{USER}'@'127.0.0.1' WITH GRANT OPTION;\n"
        );
        fs::write(home.join("init.sql"), init).context("writing init.sql")?;
        give_to(self.user.as_ref(), &home.join("init.sql"))?;
        let data = home.join("data");
        if data.exists() {
            return Ok(());
        }
        // Made beside its place and moved there when complete, so that an interrupted start leaves no half of one.
        let new = home.join("data.new");
        if new.exists() {
            fs::remove_dir_all(&new).context("clearing an unfinished data folder")?;
        }
        let mut install = Command::new(&self.install_db);
        install.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]);
        install.args(["--skip-name-resolve", "--innodb-flush-method=nosync"]);
        install.arg(format!("--datadir={}", new.display()));
        run_as(&mut install, self.user.as_ref(), home);
        run_quietly(&mut install, &home.with_extension("init.log"), interrupt)?;
        fs::rename(&new, &data).context("putting the data folder in place")
    }

    fn command(&self, home: &Path, port: u16, durability: Durability) -> Command {
        let mut command = daemon_command(&self.server, self.stop_with());
        command.arg("--no-defaults");
        command.arg(format!("--datadir={}", home.join("data").display()));
        command.arg(format!("--init-file={}", home.join("init.sql").display()));
        command.args(["--bind-address=127.0.0.1", &format!("--port={port}")]);
        // Relative to the data folder: a whole path may exceed what a socket's name can hold.
        command.args(["--socket=mariadb.sock", "--pid-file=mariadb.pid"]);
        command.args(["--skip-name-resolve", "--max-connections=200", "--innodb-buffer-pool-size=256M"]);
        // The collation stays the server's default, which ignores case: what must not be is the schema's to say.
        command.args(["--character-set-server=utf8mb4", "--default-time-zone=+00:00"]);
        match durability {
            Durability::Real => command.arg("--innodb-flush-log-at-trx-commit=1"),
            Durability::Relaxed => command.args(["--innodb-flush-log-at-trx-commit=2", "--innodb-flush-method=nosync"]),
        };
        run_as(&mut command, self.user.as_ref(), home);
        command
    }

    fn is_ready(&self, port: u16) -> bool {
        stdout_of(self.client(&self.admin, port).args(["--connect-timeout=2", "ping"])).is_some()
    }

    fn url(&self, port: u16) -> String {
        format!("mysql://{USER}:{USER}@127.0.0.1:{port}")
    }

    fn create_database(&self, port: u16, name: &str) -> Result<String> {
        let sql = format!("CREATE DATABASE IF NOT EXISTS {name}");
        let created = self.client(&self.client, port).args(["--execute", &sql]).output().context("running mariadb")?;
        if !created.status.success() {
            bail!("creating the database {name}: {}", String::from_utf8_lossy(&created.stderr).trim());
        }
        Ok(format!("{}/{name}", self.url(port)))
    }
}
