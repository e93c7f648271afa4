//! Real processes of the mesh, to be killed: one all-in-one, or one a role.

use std::{
    fs::File,
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use mesh::testing::eventually;
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

use crate::{SECRET, Site};

/// One process of the mesh. Killed when it goes.
#[derive(Debug)]
pub struct Process {
    program: PathBuf,
    arguments: Vec<String>,
    /// Where its log goes; to this process's stderr when nowhere.
    log: Option<PathBuf>,
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
        let process = Self::spawn(Path::new(program), arguments, address, None).expect("the program starts");
        process.ready().await;
        process
    }

    /// Starts it and does not wait. Its log is appended to a file, where one is named.
    pub fn spawn(
        program: &Path,
        arguments: Vec<String>,
        address: SocketAddr,
        log: Option<PathBuf>,
    ) -> io::Result<Self> {
        let admin = free_address();
        let child = launch(program, &arguments, address, admin, log.as_deref())?;
        Ok(Self { program: program.to_owned(), arguments, log, address, admin, child })
    }

    /// SIGKILL, as the machine's memory killer would.
    pub fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// SIGTERM, as an orchestrator would; how it ended, and after how long.
    pub async fn terminate(&mut self) -> (ExitStatus, Duration) {
        let asked = Instant::now();
        let status = self.stop(Duration::from_secs(30)).await.expect("it ends when asked to");
        (status, asked.elapsed())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits"));
        Ok(signal::kill(pid, signal)?)
    }

    /// Asks it to end, and waits; an error when it takes longer than `limit`.
    pub async fn stop(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let ended = async {
            loop {
                if let Some(status) = self.child.try_wait()? {
                    return Ok(status);
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(limit, ended).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Starts it again where it was, and waits until it is ready.
    pub async fn restart(&mut self) {
        self.launch_again().expect("the program starts");
        self.ready().await;
    }

    /// Starts it again where it was, and does not wait.
    pub fn launch_again(&mut self) -> io::Result<()> {
        self.child = launch(&self.program, &self.arguments, self.address, self.admin, self.log.as_deref())?;
        Ok(())
    }

    /// The door, where this process has one.
    pub fn site(&self) -> Site {
        Site::at(self.address)
    }

    /// One of the program's own verbs at its door, by an operator: what it prints, and how it ends.
    pub fn verb(&self, arguments: &[&str]) -> (String, ExitStatus) {
        let output = Command::new(&self.program)
            .args(arguments)
            .args(["--gateway", &format!("http://{}", self.address)])
            .env("SECKILL_AUTH_HS256_SECRET", SECRET)
            .stderr(Stdio::inherit())
            .output()
            .expect("the program starts");
        (String::from_utf8(output.stdout).expect("text"), output.status)
    }

    /// One HTTP request at its door, and the answer as it came.
    pub async fn http(&self, method: &str, path: &str, headers: &[(&str, String)], body: &str) -> io::Result<String> {
        http(self.address, method, path, headers, body).await
    }

    /// Whether it says that it is ready.
    pub async fn is_ready(&self) -> bool {
        let asked = http(self.admin, "GET", "/readyz", &[], "");
        matches!(tokio::time::timeout(Duration::from_secs(1), asked).await, Ok(Ok(answer)) if answer.starts_with("HTTP/1.1 200"))
    }

    async fn ready(&self) {
        eventually("the process is ready", async || self.is_ready().await.then_some(())).await;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead already; either way it is gone after this.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address that is free now. Somebody may take it before it is used; then the start fails loudly. Not from the range
/// that outgoing connections take theirs from (32768 up, on Linux): a process that was killed must find its port free.
pub fn free_address() -> SocketAddr {
    let candidates = std::iter::repeat_with(|| SocketAddr::from(([127, 0, 0, 1], rand::random_range(10_000..32_000))));
    candidates.take(1000).find(|address| TcpListener::bind(address).is_ok()).expect("a free port")
}

fn launch(
    program: &Path,
    arguments: &[String],
    address: SocketAddr,
    admin: SocketAddr,
    log: Option<&Path>,
) -> io::Result<Child> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .args(["--listen", &address.to_string(), "--admin-listen", &admin.to_string()])
        .env("SECKILL_AUTH_HS256_SECRET", SECRET)
        .env("SECKILL_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if let Some(log) = log {
        command.stderr(File::options().create(true).append(true).open(log)?);
    }
    command.spawn()
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
