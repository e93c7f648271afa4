//! Real processes of the mesh, to be killed: one all-in-one, or one a role.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use mesh::testing::eventually;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{SECRET, Site};

/// One process of the mesh. Killed when it goes.
#[derive(Debug)]
pub struct Process {
    program: PathBuf,
    arguments: Vec<String>,
    /// Where it serves.
    pub address: SocketAddr,
    admin: SocketAddr,
    child: Child,
}

impl Process {
    /// Starts `program` with these arguments and waits until it is ready. It keeps its addresses when it is started
    /// again, as those who call it expect.
    pub async fn start(program: &str, arguments: Vec<String>) -> Self {
        Self::start_at(program, arguments, free_address()).await
    }

    /// The same, at an address that others have been told already.
    pub async fn start_at(program: &str, arguments: Vec<String>, address: SocketAddr) -> Self {
        let admin = free_address();
        let program = PathBuf::from(program);
        let child = spawn(&program, &arguments, address, admin);
        let process = Self { program, arguments, address, admin, child };
        process.ready().await;
        process
    }

    /// SIGKILL, as the machine's memory killer would.
    pub fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// SIGTERM, as an orchestrator would; how it ended, and after how long.
    pub async fn terminate(&mut self) -> (ExitStatus, Duration) {
        let asked = Instant::now();
        let pid = i32::try_from(self.child.id()).expect("a process id");
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it can be asked");
        let status = eventually("the process ends", async || self.child.try_wait().expect("a child of ours")).await;
        (status, asked.elapsed())
    }

    /// Starts it again where it was.
    pub async fn restart(&mut self) {
        self.child = spawn(&self.program, &self.arguments, self.address, self.admin);
        self.ready().await;
    }

    /// The door, where this process has one.
    pub fn site(&self) -> Site {
        Site::at(self.address)
    }

    /// One HTTP request at its door, and the answer as it came.
    pub async fn http(&self, method: &str, path: &str, headers: &[(&str, String)], body: &str) -> io::Result<String> {
        http(self.address, method, path, headers, body).await
    }

    async fn ready(&self) {
        eventually("the process is ready", async || {
            let answer = http(self.admin, "GET", "/readyz", &[], "").await.ok()?;
            answer.starts_with("HTTP/1.1 200").then_some(())
        })
        .await;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead already; either way it is gone after this.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address that is free now. Somebody may take it before it is used; then the start fails loudly.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound address")
}

fn spawn(program: &PathBuf, arguments: &[String], address: SocketAddr, admin: SocketAddr) -> Child {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .args(["--listen", &address.to_string(), "--admin-listen", &admin.to_string()])
        .env("SECKILL_AUTH_HS256_SECRET", SECRET)
        .env("SECKILL_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command.spawn().expect("the program starts")
}

/// The plainest of HTTP: no client to share a fault with what is tested.
async fn http(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, String)],
    body: &str,
) -> io::Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n");
    stream.write_all(format!("{head}{headers}\r\n{body}").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}
